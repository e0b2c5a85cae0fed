/** Two cells of one region: a collection is in one of them, either says where, and a client finds it from both. */
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { VectorDB } from "../../src/client/index.ts"
import { freePort } from "../../src/shards/freePort.ts"
import { type RunningNode, startNode } from "../support/Node.ts"
import { type Postgres, skipPostgres, startPostgres } from "../support/Postgres.ts"

describe.skipIf(skipPostgres)("a region of two cells", () => {
  let postgres: Postgres
  const cells: Array<RunningNode> = []
  const startCell = async (cell: string, data?: string) => {
    const port = await freePort("127.0.0.1")
    const cellUrl = `http://127.0.0.1:${port}`
    return startNode({ cell, port, cellUrl, directoryUrl: postgres.url, ...(data === undefined ? {} : { data }) })
  }
  beforeAll(async () => {
    postgres = await startPostgres()
    cells.push(...(await Promise.all(["a", "b"].map((cell) => startCell(cell)))))
  }, 60_000)
  afterAll(async () => {
    for (const cell of cells) await cell.stop()
    await postgres.stop()
  })

  const put = (node: RunningNode | undefined, name: string) =>
    fetch(`${node?.base}/api/v1/collections/${name}`, {
      method: "PUT",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ dimensions: 2 })
    })

  it("has each collection once, and says of the others where they are", { timeout: 60_000 }, async () => {
    const [a, b] = cells
    assert.strictEqual((await put(a, "one")).status, 201)
    for (const asked of [
      await put(b, "one"),
      await fetch(`${b?.base}/api/v1/collections/one`),
      await fetch(`${b?.base}/api/v1/embed/x?collection=one`),
      await fetch(`${b?.base}/api/v1/search`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ collection: "one", query: [1, 0], k: 1 })
      })
    ]) {
      const { code, cell, location } = (await asked.json()) as Record<string, string>
      assert.deepStrictEqual(
        [asked.status, code, cell, location],
        [421, "collection_elsewhere", "a", a?.base],
        asked.url
      )
      assert.notMatch(asked.headers.get("cache-control") ?? "", /max-age/)
    }
    const none = await fetch(`${b?.base}/api/v1/collections/none`)
    assert.strictEqual(none.status, 404)

    // Of two that make it at once one has it.
    const made = await Promise.all(cells.map((node) => put(node, "race")))
    assert.deepStrictEqual(made.map(({ status }) => status).sort(), [201, 421])

    // Deleted, its name is anybody's.
    assert.strictEqual((await fetch(`${a?.base}/api/v1/collections/one`, { method: "DELETE" })).status, 204)
    assert.strictEqual((await put(b, "one")).status, 201)
    assert.strictEqual((await put(a, "one")).status, 421)
  })

  it("is one service to the client, whichever cell it asks", { timeout: 60_000 }, async () => {
    const [a, b] = cells
    for (const streaming of [true, false]) {
      const collection = `client-${streaming}`
      assert.strictEqual((await put(a, collection)).status, 201)
      const db = new VectorDB({ endpoint: b?.base as string, collection, streaming })
      await db.insert("x", [1, 0])
      assert.deepStrictEqual(
        (await db.search([1, 0], { k: 1 })).map(({ id }) => id),
        ["x"]
      )
      assert.strictEqual((await db.get("x"))?.id, "x")
      const streamed: Array<string> = []
      for await (const { id } of db.searchStream([1, 0], { k: 1 })) streamed.push(id)
      assert.deepStrictEqual(streamed, ["x"])
      await db.close()
    }
  })

  it("serves what each cell has while the directory is gone", { timeout: 60_000 }, async () => {
    const [a, b] = cells
    assert.strictEqual((await put(a, "kept")).status, 201)
    await postgres.kill()
    assert.strictEqual((await fetch(`${a?.base}/api/v1/collections/kept`)).status, 200)
    const unknown = await fetch(`${b?.base}/api/v1/collections/kept`)
    assert.strictEqual(unknown.status, 503)
    assert.strictEqual(((await unknown.json()) as { code: string }).code, "storage_unavailable")
    await postgres.start()
    const until = Date.now() + 30_000
    let status = 0
    while (status !== 421 && Date.now() < until) {
      status = (await fetch(`${b?.base}/api/v1/collections/kept`)).status
      if (status !== 421) await new Promise((resolve) => setTimeout(resolve, 100))
    }
    assert.strictEqual(status, 421)
  })
})
