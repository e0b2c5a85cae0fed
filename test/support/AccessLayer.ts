/** Access as a node has it, over a store of keys in memory; the settings say who may what. */
import { Layer } from "effect"
import { Access } from "../../src/gateway/Access.ts"
import { ApiKeyring } from "../../src/gateway/ApiKeyring.ts"
import { RateLimits } from "../../src/gateway/RateLimits.ts"
import { TokenVerifier } from "../../src/gateway/TokenVerifier.ts"
import { ObjectStore } from "../../src/tiers/ObjectStore.ts"

export const accessLayer = Access.layer.pipe(
  Layer.provide(Layer.mergeAll(ApiKeyring.layer, TokenVerifier.layer, RateLimits.layerWith)),
  Layer.provide(ObjectStore.layerMemory)
)
