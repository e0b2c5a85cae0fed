// Nothing of Effect is imported here: in this folder it would be Effect 3.
import { execFile } from "node:child_process"
import { existsSync } from "node:fs"
import { fileURLToPath } from "node:url"
import { promisify } from "node:util"
import { assert, describe, it } from "vitest"
import { causeTree } from "../../src/gateway/RpcSerializations.ts"
import { openRpcServer } from "../gateway/rpcServer.ts"

const here = (path: string) => fileURLToPath(new URL(path, import.meta.url))

const installed = existsSync(here("node_modules/@effect/rpc/package.json"))
const isCi = (process.env["RUVECTOR_CI"] ?? "") !== ""

const how = "The Effect 3 packages of test/interop are not installed: run `npm ci` in test/interop."
if (!installed && !isCi) console.warn(`${how} Its test is skipped.`)

type Outcome =
  | { readonly success: unknown }
  | {
      readonly failures: ReadonlyArray<unknown>
      readonly defects: ReadonlyArray<unknown>
      readonly interruptors: number
      readonly interrupted: boolean
    }

interface Printed {
  readonly http: Readonly<Record<string, Outcome>>
  readonly webSocket: Readonly<Record<string, Outcome>>
  readonly tooLarge: Outcome
  readonly causes: ReadonlyArray<Outcome>
}

/** Runs the client against a server, and gives what it printed and what the server saw. */
const runClient = async () => {
  const { port, seen, close } = await openRpcServer({ maxBodyBytes: 65_536 })
  try {
    const causes = JSON.stringify(causesOfEveryKind.map(causeTree))
    const args = [here("client.mjs"), `http://127.0.0.1:${port}`, causes]
    const { stdout } = await promisify(execFile)(process.execPath, args, { timeout: 60_000 })
    return { printed: JSON.parse(stdout) as Printed, seen }
  } finally {
    await close()
  }
}

const causesOfEveryKind: Parameters<typeof causeTree>[0][] = [
  [],
  [{ _tag: "Fail", error: "one" }],
  [
    { _tag: "Fail", error: "one" },
    { _tag: "Die", defect: { name: "Error", message: "two" } },
    { _tag: "Fail", error: "three" }
  ],
  [
    { _tag: "Interrupt", fiberId: 7 },
    { _tag: "Interrupt", fiberId: undefined },
    { _tag: "Interrupt", fiberId: null }
  ]
]

const failed = (error: object): Outcome => ({ failures: [error], defects: [], interruptors: 0, interrupted: false })
const died = (defect: unknown): Outcome => ({ failures: [], defects: [defect], interruptors: 0, interrupted: false })
const invalid = (field: string, expected: string, got: string) => failed({ _tag: "InvalidInput", field, expected, got })

const collection = { name: "words", dimensions: 2, metric: "ip", partitions: 1 }
const id = "ü\u{1f600}"

/** What each call comes to, ids of queries and defects left empty. */
const expected: Readonly<Record<string, Outcome>> = {
  create: { success: { collection, created: true } },
  conflict: failed({ _tag: "CollectionConflict", collection: "words", field: "dimensions", expected: "2", got: "3" }),
  insert: { success: { inserted: 2 } },
  list: { success: [collection] },
  collection: { success: { ...collection, count: 2 } },
  search: {
    success: {
      query_id: "",
      results: [
        { vector_id: "a", score: 1, metadata: '{"n":1}' },
        { vector_id: id, score: 0.5, metadata: "{}" }
      ],
      total_results: 2,
      partial: false,
      missing_partitions: [],
      took_ms: 0.25
    }
  },
  stream: {
    success: [
      { event: "search_start", query_id: "" },
      { event: "result", vector_id: "a", score: 1, vector: [1, 0] },
      { event: "result", vector_id: id, score: 0.5, vector: [0.5, 0.5] },
      { event: "search_complete", total_results: 2, partial: false, missing_partitions: [] }
    ]
  },
  get: { success: { vector_id: id, vector: [0.5, 0.5], metadata: "{}", version: "" } },
  update: { success: { vector_id: "a", metadata: '{"n":1,"m":"ü"}', version: "" } },
  delete: { success: { deleted: 1 } },
  vectorNotFound: failed({ _tag: "VectorNotFound", collection: "words", id: "a" }),
  collectionNotFound: failed({ _tag: "CollectionNotFound", collection: "none" }),
  streamNotFound: failed({ _tag: "CollectionNotFound", collection: "none" }),
  badK: invalid("k", "an integer from 1 to 10000", "0"),
  badVector: invalid("vectors[1].vector", "little-endian float32 bytes of 1 to 4096 finite numbers", "4 bytes"),
  badFilter: invalid("filter.a.near", "one of in, gt, gte, lt, lte, exists", "near"),
  internal: failed({ _tag: "InternalError", requestId: "" }),
  noSuchCall: died("Unknown request tag: NoSuchCall"),
  large: {
    success: [["search_start", 0], ...Array.from({ length: 10 }, () => ["result", 10_000]), ["search_complete", 0]]
  },
  interrupted: { failures: [], defects: [], interruptors: 1, interrupted: true },
  many: { success: 100 },
  deleteCollection: { success: "void" }
}

const withoutIds = (outcomes: unknown): unknown =>
  JSON.parse(
    JSON.stringify(outcomes, (key, value) => (["query_id", "requestId", "version"].includes(key) ? "" : value))
  )

describe("a client of the Effect 3 package @effect/rpc", () => {
  it.skipIf(!installed && !isCi)(
    "is answered over HTTP and WebSocket: successes, streams, failures, interruption",
    async () => {
      assert.isTrue(installed, how)
      const { printed, seen } = await runClient()
      assert.deepStrictEqual(withoutIds(printed.http), expected)
      assert.deepStrictEqual(withoutIds(printed.webSocket), expected)
      assert.deepStrictEqual(printed.tooLarge, died("The body is over its limit of 65536 bytes."))
      assert.deepStrictEqual(printed.causes, [
        { failures: [], defects: [], interruptors: 0, interrupted: false },
        { failures: ["one"], defects: [], interruptors: 0, interrupted: false },
        { failures: ["one", "three"], defects: ["two"], interruptors: 0, interrupted: false },
        { failures: [], defects: [], interruptors: 2, interrupted: true }
      ])
      // Both streams that the client stopped waiting for were ended here, and nothing is left of any.
      assert.deepStrictEqual(
        { underWay: seen.searchesUnderWay, interrupted: seen.searchesInterrupted, sessions: seen.sessionsOpen },
        { underWay: 0, interrupted: 2, sessions: 0 }
      )
    },
    90_000
  )
})
