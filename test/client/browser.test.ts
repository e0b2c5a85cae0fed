/** The client as a browser gets it: one bundle of a bounded size, run in a real Chromium, from a page of another origin. */
import { once } from "node:events"
import { mkdtemp, readFile, rm } from "node:fs/promises"
import { createServer } from "node:http"
import type { AddressInfo } from "node:net"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { gzipSync } from "node:zlib"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { rolldown } from "rolldown"
import { startChromium, withoutChromium } from "../support/Chromium.ts"
import { startNode } from "../support/Node.ts"

const entry = new URL("../../src/client/index.ts", import.meta.url).pathname
const gzippedBytesMax = 40 * 1_024

describe("the client's bundle", () => {
  let directory = ""
  let code = ""
  beforeAll(async () => {
    directory = await mkdtemp(join(tmpdir(), "ruvector-bundle-"))
    const bundle = await rolldown({ input: entry, platform: "browser" })
    await bundle.write({ file: join(directory, "client.js"), format: "esm", minify: true })
    await bundle.close()
    code = await readFile(join(directory, "client.js"), "utf8")
  })
  afterAll(() => rm(directory, { recursive: true }))

  it("imports nothing, of Node least of all, and is small", () => {
    assert.notMatch(code, /\bimport\s*[("'{*]|\bfrom\s*["']/)
    assert.isAtMost(gzipSync(code, { level: 9 }).length, gzippedBytesMax)
  })

  it.skipIf(withoutChromium())("works in Chromium", { timeout: 60_000 }, async () => {
    const node = await startNode()
    const site = createServer((request, response) => {
      const [type, body] =
        request.url === "/client.js" ? ["text/javascript", code] : ["text/html", "<!doctype html><title>page</title>"]
      response.writeHead(200, { "content-type": type }).end(body)
    })
    site.listen(0, "127.0.0.1")
    await once(site, "listening")
    const browser = await startChromium()
    try {
      const page = await browser.newPage()
      await page.goto(`http://127.0.0.1:${(site.address() as AddressInfo).port}/`)
      const found = await page.evaluate(
        // Text, since it is run there and not here.
        `(async () => {
          const { VectorDB } = await import("/client.js")
          const found = {}
          for (const streaming of [true, false]) {
            const db = new VectorDB({ endpoint: ${JSON.stringify(node.base)}, region: "auto", streaming })
            await db.insert("a", [1, 0, 0], { metadata: { type: "task", status: "pending" } })
            await db.insert("b", new Float32Array([0, 1, 0]))
            await db.update("a", { metadata: { status: "completed" } })
            const ids = []
            for await (const { id, score } of db.searchStream([1, 0, 0], { k: 10 })) ids.push([id, score])
            const code = await db.search([1]).catch((error) => error.code)
            found[streaming] = { ids, metadata: (await db.get("a")).metadata, code, none: await db.get("none") ?? null }
            await db.close()
          }
          return found
        })()`
      )
      const each = {
        ids: [
          ["a", 1],
          ["b", 0]
        ],
        metadata: { type: "task", status: "completed" },
        code: "invalid_input",
        none: null
      }
      assert.deepStrictEqual(found, { true: each, false: each })
    } finally {
      await browser.close()
      site.close()
      await node.stop()
    }
  })
})
