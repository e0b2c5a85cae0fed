/**
 * `GET /api/v1/cluster` for operators: the nodes of the cell, and partitions in quarantine; `POST /api/v1/cluster/release` ends a
 * quarantine. Without the database the answer has this node alone, and says so.
 */
import type { IncomingMessage } from "node:http"
import * as NodeHttpServerRequest from "@effect/platform-node/NodeHttpServerRequest"
import { Context, Effect, Metric } from "effect"
import * as ShardId from "effect/cluster/ShardId"
import * as Sharding from "effect/cluster/Sharding"
import { HttpRouter, HttpServerRequest, HttpServerResponse } from "effect/http"
import { Settings } from "../config.ts"
import { ReleaseRequest } from "../protocol/Cluster.ts"
import type { ApiError } from "../protocol/Errors.ts"
import { decoderOf } from "../protocol/Fields.ts"
import { partitionsGroup } from "../protocol/IndexPartition.ts"
import { isOperator } from "../protocol/Principal.ts"
import { ClusterNodes } from "../shards/ClusterNodes.ts"
import { LocalActors } from "../shards/LocalActors.ts"
import { shardsPerGroup } from "../shards/Membership.ts"
import { Router } from "../shards/Router.ts"
import { Shedding } from "../shards/Shedding.ts"
import * as Bodies from "./Bodies.ts"
import { callerOf, operatorsOnly } from "./Callers.ts"
import { problemResponse } from "./Problems.ts"
import { Readiness } from "./Readiness.ts"

export const clusterPath = "/api/v1/cluster"
export const releasePath = "/api/v1/cluster/release"

const decodeRelease = decoderOf(ReleaseRequest)

const shardsGauge = Metric.gauge("ruvector_cluster_shards", { description: "Shards that this node owns" })

/** What this node says of itself from now on; `url` is where it listens. */
export const reporting = Effect.fnUntraced(function* (url: string) {
  const nodes = yield* ClusterNodes
  const { role } = yield* Settings
  const sharding = yield* Sharding.Sharding
  const readiness = yield* Readiness
  const local = yield* LocalActors
  const shedding = yield* Shedding
  const groups = ["default", partitionsGroup]
  const shardsOwned = () => {
    let owned = 0
    for (const group of groups) {
      for (let n = 1; n <= shardsPerGroup; n++) owned += Number(sharding.hasShardId(ShardId.make(group, n)))
    }
    return owned
  }
  nodes.reportWith(() => {
    const quarantined = local.quarantined()
    const shards = role === "gateway" ? 0 : shardsOwned()
    shardsGauge.updateUnsafe(shards, Context.empty())
    return {
      url,
      ready: readiness.get().state === "ready",
      shards,
      partitions: local.partitions.size,
      load_level: shedding.level(),
      quarantined: quarantined.slice(0, quarantinedTold)
    }
  })
})

/** Of one node; the metric has them all. */
const quarantinedTold = 100

export const layer = HttpRouter.use(
  Effect.fnUntraced(function* (router) {
    const nodes = yield* ClusterNodes
    const settings = yield* Settings
    const partitions = yield* Router
    yield* router.add(
      "GET",
      clusterPath,
      Effect.gen(function* () {
        const found = yield* Effect.result(nodes.all)
        const all = found._tag === "Success" ? found.success : [nodes.own()]
        return json({
          cell: settings.cell,
          node: nodes.node,
          ...(found._tag === "Success" ? {} : { partial: "The cluster's database does not answer: this node alone." }),
          nodes: all
        })
      })
    )
    yield* router.add(
      "POST",
      releasePath,
      Effect.gen(function* () {
        const request = yield* HttpServerRequest.HttpServerRequest
        const caller = callerOf(NodeHttpServerRequest.toIncomingMessage(request) as IncomingMessage)
        if (!isOperator(caller)) return yield* operatorsOnly
        const body = yield* Bodies.json(request, settings)
        const { collection, partition } = yield* Effect.fromResult(decodeRelease(body))
        return json({ released: yield* partitions.release(collection, partition) })
      }).pipe(Effect.catch((error: ApiError) => Effect.succeed(problemResponse(error))))
    )
  })
)

const json = (value: unknown) => HttpServerResponse.jsonUnsafe(value, { headers: { "cache-control": "no-store" } })
