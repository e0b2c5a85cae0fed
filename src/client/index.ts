/** The client, with promises and on Effect, for browsers too: nothing of Node is imported here. */
export * from "./promiseApi.ts"
export { VectorClient } from "./VectorClient.ts"
