/** The client, for browsers too: nothing of Node is imported here. */
export type { ProblemCode } from "../protocol/Errors.ts"
export { type ClientErrorCode, type ErrorCode, hasCode, VectorDBError } from "./ClientError.ts"
export type { ClientOptions, Credential, WebSocketLike } from "./ClientOptions.ts"
export type {
  Ack,
  CollectionChange,
  CollectionInfo,
  CollectionParameters,
  Filter,
  MemberChange,
  Metadata,
  Query,
  SearchHit,
  Vector
} from "./Engine.ts"
export type { StandardIssue, StandardResult, StandardSchema } from "./StandardSchema.ts"
export {
  type Call,
  type Change,
  type Collections,
  type FollowCall,
  type Hit,
  type Hits,
  type InsertCall,
  type InsertManyCall,
  type NewItem,
  type SearchCall,
  type Standing,
  type Stored,
  type SubscribeCall,
  type TypedClient,
  VectorClient,
  type VectorDBOptions,
  type WriteCall
} from "./VectorClient.ts"
export { type Aborts, type EngineOptions, VectorDB } from "./VectorDB.ts"
