/** A vector thread that dies of segments with a certain word in them, as long as the file is there that says so. */
import { existsSync } from "node:fs"
import { Resident } from "../../src/tiers/index/Resident.ts"
import "../../src/tiers/vectorThread.ts"

const apply = Resident.prototype.apply
Resident.prototype.apply = function* (this: Resident, segment: Uint8Array) {
  if (Buffer.from(segment).includes("poison") && existsSync(process.env["RUVECTOR_TEST_POISON"] ?? "")) process.exit(13)
  return yield* apply.call(this, segment)
}
