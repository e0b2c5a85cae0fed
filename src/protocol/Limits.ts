/**
 * Bounds that are part of the contract with clients: a value outside them is refused with a typed error that names the
 * bound, on every wire and in every version. Bounds an operator may choose are in `config.ts`.
 */

/** Components of one vector. */
export const dimensionsMax = 4_096

/** Results of one search. */
export const kMax = 10_000

/** Width of the search beam (`ef`), candidates. */
export const efMax = 10_000

/** UTF-8 bytes of a vector's id. */
export const idBytesMax = 512

/** Characters of a collection's name. */
export const collectionNameCharsMax = 128

/** Characters of a tenant's name. */
export const tenantCharsMax = 64

/** Characters of an API key's name. */
export const keyNameCharsMax = 128

/** Collections that an API key can be restricted to. */
export const keyCollectionsMax = 100

/** Collections on one node. */
export const collectionsMax = 10_000

/** Partitions of one collection. */
export const partitionsMax = 256

/** Bytes of one record's metadata, as JSON. */
export const metadataBytesMax = 65_536

/** Characters of a client's key for a request. */
export const idempotencyKeyMax = 200

/** Levels of nesting of metadata and of filters. */
export const nestingMax = 16

/** Conditions in one filter, over all its levels. */
export const filterConditionsMax = 64

/** Values in one `in` condition. */
export const filterValuesMax = 1_024

/** Characters of a string that metadata is indexed by, and so of one that a filter can name. */
export const filterStringCharsMax = 1_024

/** Members of a standing query's answer. */
export const standingMembersMax = 256

/** Characters of a cursor. */
export const cursorCharsMax = 8_192

/** Vectors of one insert, ids of one delete. */
export const batchItemsMax = 10_000

/** Characters of a request id or session label given by a client. */
export const clientIdCharsMax = 128

/** Events that one frame gives credit for, and that a session has credit for at most. */
export const creditsMax = 1_000_000

/** Milliseconds a caller may ask to wait. */
export const deadlineMillisMax = 60_000

/** Vector components in one answer (results times dimensions), where vectors are asked for. */
export const answerComponentsMax = 2_097_152

/** Ids of one invalidation. */
export const invalidationIdsMax = 1_000

/** Invalidations of one collection whose notice has not passed. */
export const invalidationsPendingMax = 16

/** Milliseconds of notice of an invalidation. */
export const noticeMillisMax = 300_000

/** Records of one warming. */
export const warmRecordsMax = 100_000

/** Topics of all tenants on one node. */
export const topicsMax = 10_000

/** Channels of one topic. */
export const channelsMax = 64

/** Milliseconds that a topic's messages and tasks are kept. */
export const retentionMillisMax = 2_592_000_000

/** Bytes of one message or task, as JSON. */
export const messageBytesMax = 262_144

/** Messages of one publishing, tasks of one enqueueing, ids of one redriving or cancelling, tasks of one list. */
export const publishMessagesMax = 1_000

/** Tasks handed out by one taking. */
export const takeTasksMax = 100

/** Milliseconds of a task's lease. */
export const leaseMillisMax = 86_400_000

/** Greatest priority of a task; the least is its negative. */
export const priorityMax = 1_000

/** Characters of what is said about why a task failed. */
export const taskErrorCharsMax = 1_024
