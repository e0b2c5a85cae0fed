import { assert, describe, it } from "@effect/vitest"
import { CRC32C } from "@google-cloud/storage"
import { crc32c, crc32cJoin, crc32cText } from "../../src/tiers/Crc32c.ts"
import { seededRandom } from "./FaultyObjectStore.ts"

const seed = 7
const bytes = (() => {
  const random = seededRandom(seed)
  return Uint8Array.from({ length: 5_000 }, () => Math.floor(random() * 256))
})()

describe("CRC-32C", () => {
  it("is that of RFC 3720, appendix B.4", () => {
    assert.strictEqual(crc32c(new Uint8Array(32)), 0x8a91_36aa)
    assert.strictEqual(crc32c(new Uint8Array(32).fill(0xff)), 0x62a8_ab43)
    assert.strictEqual(crc32c(Uint8Array.from({ length: 32 }, (_, i) => i)), 0x46dd_794e)
    assert.strictEqual(crc32c(new Uint8Array(0)), 0)
  })

  it(`is the storage library's, at any place and length (seed ${seed})`, () => {
    for (let from = 0; from < 12; from++) {
      for (const length of [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 100, 1_001, 4_096]) {
        const part = bytes.subarray(from, from + length)
        const reference = new CRC32C()
        reference.update(Buffer.from(part))
        assert.strictEqual(crc32cText(crc32c(part)), reference.toString(), `${length} bytes from ${from}`)
      }
    }
  })

  it("goes on, and is joined, from parts", () => {
    const whole = crc32c(bytes)
    for (const at of [0, 1, 3, 8, 1_000, 4_095, 4_999, 5_000]) {
      const [first, second] = [bytes.subarray(0, at), bytes.subarray(at)]
      assert.strictEqual(crc32c(second, crc32c(first)), whole)
      assert.strictEqual(crc32cJoin(crc32c(first), crc32c(second), second.length), whole, `${at}`)
    }
  })
})
