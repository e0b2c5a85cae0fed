/**
 * Results that are slow to make and always the same (the parsed word vectors, exact truth), kept as binary files beside
 * the benchmark. A file is used only if its checksum still matches; otherwise it is made again.
 */
import { mkdirSync, readFileSync, renameSync, writeFileSync } from "node:fs"
import { fileURLToPath } from "node:url"
import { crc32 } from "node:zlib"

export const cacheDirectory = fileURLToPath(new URL(".cache/", import.meta.url))

/** The bytes kept under `name`, or those of `make`, kept for the next time. They start at a multiple of 8. */
export const cached = (name: string, make: () => Buffer): Buffer => {
  const path = `${cacheDirectory}${name}.bin`
  const kept = read(path)
  if (kept !== undefined) return kept
  const payload = make()
  mkdirSync(cacheDirectory, { recursive: true })
  const header = Buffer.alloc(headerBytes)
  header.write(magic, "latin1")
  header.writeUInt32LE(crc32(payload), magic.length)
  // Written aside and renamed, so that a run cut short leaves no half file under the name.
  const aside = `${path}.${process.pid}.tmp`
  writeFileSync(aside, header)
  writeFileSync(aside, payload, { flag: "a" })
  renameSync(aside, path)
  return payload
}

const magic = "rvbench1"
const headerBytes = 16

const read = (path: string): Buffer | undefined => {
  let file: Buffer
  try {
    file = readFileSync(path)
  } catch {
    return undefined
  }
  if (file.length < headerBytes || file.toString("latin1", 0, magic.length) !== magic) return undefined
  const payload = file.subarray(headerBytes)
  return crc32(payload) === file.readUInt32LE(magic.length) ? payload : undefined
}
