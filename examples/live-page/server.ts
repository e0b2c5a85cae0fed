/**
 * A page that searches as one types and shows what is nearest at any time, from whichever page it was written. The page
 * speaks to the database itself; what is here serves three files.
 *
 *     npx ruvector serve
 *     node examples/live-page/server.ts [http://127.0.0.1:8080]
 */
import { readFile } from "node:fs/promises"
import { createServer } from "node:http"
import type { AddressInfo } from "node:net"
import { fileURLToPath } from "node:url"
import { VectorDB } from "ruvector-streaming"

const endpoint = process.argv[2] ?? "http://127.0.0.1:8080"

const db = new VectorDB({ endpoint })
await db.collections.create("notes", { dimensions: 256 })
await db.close()

const files: Readonly<Record<string, readonly [type: string, url: string]>> = {
  "/": ["text/html", import.meta.resolve("./page.html")],
  "/embed.js": ["text/javascript", import.meta.resolve("../embed.mjs")],
  // The client as one file that imports nothing.
  "/ruvector.js": ["text/javascript", import.meta.resolve("ruvector-streaming/browser")]
}

const server = createServer(async (request, response) => {
  const [type, url] = files[request.url?.replace(/\?.*/, "") ?? ""] ?? []
  if (type === undefined || url === undefined) {
    response.writeHead(404).end()
    return
  }
  response.writeHead(200, { "content-type": `${type}; charset=utf-8` }).end(await readFile(fileURLToPath(url)))
})

server.listen(0, "127.0.0.1", () => {
  const { port } = server.address() as AddressInfo
  console.log(`http://127.0.0.1:${port}/?endpoint=${encodeURIComponent(endpoint)}`)
})
