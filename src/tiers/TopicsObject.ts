/** The object that lists a node's topics, and where their channels lie. The `TopicCatalog` actor is its one writer. */
import { Schema } from "effect"
import { Topic } from "../protocol/Topic.ts"

export const topicsKey = "topics"
export const topicsFormat = 1

export const TopicList = Schema.Struct({
  format: Schema.Literal(topicsFormat),
  topics: Schema.Array(Topic),
  /** Deleted, but their channels are not all gone yet. */
  removing: Schema.Array(Topic)
})
export type TopicList = typeof TopicList.Type

/** Its JSON text. */
export const TopicListText = Schema.fromJsonString(TopicList)

/** Key prefix of the objects of a channel of messages. */
export const channelPrefix = (uid: string, channel: number): string =>
  `channels/${uid}/m${String(channel).padStart(3, "0")}`

/** Key prefix of the objects of a topic's tasks. */
export const queuePrefix = (uid: string): string => `channels/${uid}/tasks`

/** Of all logs of a topic: its channels' in order, then its tasks'. */
export const topicPrefixes = ({ uid, channels }: Topic): ReadonlyArray<string> => [
  ...Array.from({ length: channels }, (_, channel) => channelPrefix(uid, channel)),
  queuePrefix(uid)
]
