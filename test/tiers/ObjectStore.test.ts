import { ObjectStore } from "../../src/tiers/ObjectStore.ts"
import { objectStoreSuite } from "./objectStoreSuite.ts"

objectStoreSuite("memory", ObjectStore.layerMemory)
