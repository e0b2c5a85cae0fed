import { describe } from "@effect/vitest"
import { Layer } from "effect"
import { withoutFakeGcs } from "../support/FakeGcs.ts"
import { cachedGcsLayer, gcsLayer, useFakeGcs } from "./gcsStores.ts"
import { objectStoreSuite } from "./objectStoreSuite.ts"

describe.skipIf(withoutFakeGcs())("Google Cloud Storage", () => {
  const server = useFakeGcs()
  objectStoreSuite("bucket", Layer.fresh(gcsLayer(server)))
  objectStoreSuite("bucket with a cache on disk", Layer.fresh(cachedGcsLayer(server)))
})
