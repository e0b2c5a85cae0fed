/** What operators see of the cell, here of a node that is alone, and whom it is not for. */
import { readdir, readFile, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { type RunningNode, startNode } from "../support/Node.ts"
import { withDirectory } from "../support/ServerProcess.ts"

interface State {
  readonly cell: string
  readonly nodes: ReadonlyArray<{
    readonly role: string
    readonly health: string
    readonly url: string
    readonly ready: boolean
    readonly shards: number
    readonly partitions: number
    readonly quarantined: ReadonlyArray<{
      readonly collection: string
      readonly failures: number
      readonly detail: string
    }>
  }>
}

describe("/api/v1/cluster", () => {
  let node: RunningNode
  beforeAll(async () => {
    node = await startNode()
  })
  afterAll(() => node.stop())

  const post = (path: string, body: unknown, headers: Record<string, string> = {}) =>
    fetch(`${node.base}/api/v1${path}`, {
      method: "POST",
      headers: { "content-type": "application/json", ...headers },
      body: JSON.stringify(body)
    })
  const state = async () => (await (await fetch(`${node.base}/api/v1/cluster`)).json()) as State
  const release = (collection: string, partition: number) => post("/cluster/release", { collection, partition })

  it("shows a node that is alone with what it has", async () => {
    const { cell, nodes } = await state()
    assert.strictEqual(cell, "main")
    assert.lengthOf(nodes, 1)
    assert.deepInclude(nodes[0], {
      role: "all",
      health: "up",
      url: node.base,
      ready: true,
      shards: 2,
      quarantined: []
    })
  })

  it("is for operators", async () => {
    const made = await post("/keys", { name: "k", scopes: ["read", "write", "admin"], tenant: "acme" })
    const { key } = (await made.json()) as { key: string }
    const headers = { authorization: `Bearer ${key}` }
    assert.strictEqual((await fetch(`${node.base}/api/v1/cluster`, { headers })).status, 403)
    const refused = await post("/cluster/release", { collection: "default", partition: 0 }, headers)
    assert.strictEqual(refused.status, 403)
  })

  it("names what a release needs, and answers whether there was one", async () => {
    assert.strictEqual((await post("/insert", { vectors: [{ id: "a", vector: [1, 0] }] })).status, 200)
    assert.strictEqual((await release("none", 0)).status, 404)
    const beyond = await release("default", 7)
    assert.strictEqual(beyond.status, 400)
    assert.strictEqual(((await beyond.json()) as { field: string }).field, "partition")
    assert.deepStrictEqual(await (await release("default", 0)).json(), { released: false })
  })

  it("shows a damaged partition in quarantine, which a release opens once it is mended", { timeout: 60_000 }, () =>
    withDirectory(async (data) => {
      const first = await startNode({ data })
      const vectors = [{ id: "a", vector: [1, 0] }]
      const headers = { "content-type": "application/json" }
      const body = JSON.stringify({ vectors })
      assert.strictEqual((await fetch(`${first.base}/api/v1/insert`, { method: "POST", headers, body })).status, 200)
      await first.stop()
      const objects = await readdir(join(data, "objects"), { recursive: true, withFileTypes: true })
      const manifests = objects
        .filter((one) => one.isFile() && join(one.parentPath, one.name).includes("manifest"))
        .map((one) => join(one.parentPath, one.name))
      assert.isAbove(manifests.length, 0)
      const whole = await Promise.all(manifests.map((path) => readFile(path)))
      await Promise.all(manifests.map((path) => writeFile(path, "damaged")))

      const node = await startNode({ data, activate: "none", quarantineFailures: 2, quarantineMillis: 60_000 })
      const code = async () => {
        const answer = await fetch(`${node.base}/api/v1/embed/a`)
        return answer.status === 200 ? "found" : ((await answer.json()) as { code: string }).code
      }
      const seen = async () =>
        ((await (await fetch(`${node.base}/api/v1/cluster`)).json()) as State).nodes[0]?.quarantined
      while ((await seen())?.length === 0) {
        assert.strictEqual(await code(), "partition_corrupt")
        await new Promise((resolve) => setTimeout(resolve, 100))
      }
      assert.deepInclude((await seen())?.[0], { collection: "default", failures: 2 })
      assert.match(
        await (await fetch(`${node.base}/metrics`)).text(),
        /^ruvector_partitions_quarantined(?:\{[^}]*\})? 1$/m
      )

      // Mended, and known to be by nobody.
      await Promise.all(manifests.map((path, i) => writeFile(path, whole[i] as Buffer)))
      assert.strictEqual(await code(), "partition_corrupt")
      const collection = (await seen())?.[0]?.collection
      const released = await fetch(`${node.base}/api/v1/cluster/release`, {
        method: "POST",
        headers,
        body: JSON.stringify({ collection, partition: 0 })
      })
      assert.deepStrictEqual(await released.json(), { released: true })
      assert.strictEqual(await code(), "found")
      assert.deepStrictEqual(await seen(), [])
      await node.stop()
    })
  )
})
