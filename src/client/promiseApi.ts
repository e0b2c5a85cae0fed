/** The client with promises, for browsers too: nothing of Node is imported here. What is for programs on Effect is beside it, in `index.ts`. */
export type { ProblemCode } from "../protocol/Errors.ts"
export { Channel, Tasks, type TopicOptions, type WorkOptions } from "./Channel.ts"
export { type ClientErrorCode, type ErrorCode, hasCode, VectorDBError } from "./ClientError.ts"
export type { ClientOptions, Credential, WebSocketLike } from "./ClientOptions.ts"
export type {
  Ack,
  CollectionChange,
  CollectionInfo,
  CollectionParameters,
  Filter,
  Heard,
  MemberChange,
  Metadata,
  Query,
  SearchHit,
  Vector
} from "./Engine.ts"
export type { Aborts } from "./Promises.ts"
export type { StandardIssue, StandardResult, StandardSchema } from "./StandardSchema.ts"
export type {
  FailOptions,
  Lease,
  LeasedTask,
  ListenOptions,
  NewMessage,
  NewTask,
  TakeOptions,
  TaskInfo,
  TaskState,
  TopicCall,
  TopicClient,
  TopicInfo,
  TopicMessage,
  TopicParameters
} from "./Topics.ts"
export type {
  Call,
  Change,
  Collections,
  FollowCall,
  Hit,
  Hits,
  InsertCall,
  InsertManyCall,
  NewItem,
  SearchCall,
  Standing,
  Stored,
  SubscribeCall,
  TypedClient,
  VectorDBOptions,
  WriteCall
} from "./VectorClient.ts"
export { type EngineOptions, VectorDB } from "./VectorDB.ts"
