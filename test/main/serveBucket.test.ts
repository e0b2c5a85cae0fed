/** A node whose data is in a bucket, as a user meets it. */
import { readdir } from "node:fs/promises"
import { join } from "node:path"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { type FakeGcs, startFakeGcs, withoutFakeGcs } from "../support/FakeGcs.ts"
import { ready, runServe, startServer, withDirectory } from "../support/ServerProcess.ts"

describe.skipIf(withoutFakeGcs())("serve with a bucket", () => {
  let server: FakeGcs | undefined
  beforeAll(async () => {
    server = await startFakeGcs()
    await server.createBucket("serve-test")
  })
  afterAll(() => server?.stop())
  const emulator = () => ({ STORAGE_EMULATOR_HOST: server?.url ?? "" })

  it("keeps everything in the bucket, so that another machine goes on after a kill", { timeout: 60_000 }, () =>
    withDirectory(async (directory) => {
      const data = "gs://serve-test/some/where"
      const start = async (cache: string) => {
        const started = await startServer(data, ["--cache-dir", join(directory, cache)], emulator())
        await ready(started.base)
        return started
      }
      const nearest = async (base: string) =>
        await (await fetch(`${base}/api/v1/stream/search?query_vector_id=b&k=3`)).text()

      const first = await start("one")
      assert.include(first.output(), `data in ${data}, cache in ${join(directory, "one")}`)
      const headers = { "content-type": "application/json" }
      const body = '{"vectors":[{"id":"a","vector":[1,0,0]},{"id":"b","vector":[0,1,0]}]}'
      await fetch(`${first.base}/api/v1/insert`, { method: "POST", headers, body })
      assert.strictEqual(await first.stop("SIGKILL"), "SIGKILL")
      assert.deepStrictEqual(await readdir(join(directory, "one", "objects")), [])

      const second = await start("two")
      assert.include(await nearest(second.base), '"vector_id":"a"')
      // Snapshotted at its end, and cached as it was stored.
      assert.strictEqual(await second.stop("SIGTERM"), 0)
      assert.strictEqual((await readdir(join(directory, "two", "cache", "files"))).length, 2)

      const third = await start("one")
      assert.include(await nearest(third.base), '"vector_id":"a"')
      assert.strictEqual((await readdir(join(directory, "one", "cache", "files"))).length, 2)
      assert.strictEqual(await third.stop("SIGTERM"), 0)
    })
  )

  it("refuses with one line a bucket that it cannot use", { timeout: 60_000 }, async () => {
    const refused = (data: string, environment: Record<string, string>, says: RegExp) =>
      withDirectory(async (directory) => {
        const flags = ["--port", "0", "--data", data, "--cache-dir", directory, "--store-attempts-max", "2"]
        const { code, stdout, stderr } = await runServe(flags, environment)
        assert.deepStrictEqual([code, stdout], [1, ""], stderr)
        assert.strictEqual(stderr.trim().split("\n").length, 1, stderr)
        assert.match(stderr, says)
      })
    const at = (address: string) => ({ STORAGE_EMULATOR_HOST: address })
    await Promise.all([
      refused(
        "gs://not-there/x",
        emulator(),
        /^ruvector: The bucket of gs:\/\/not-there\/x .* used: it does not exist\.$/m
      ),
      refused("gs://UPPER/a b", emulator(), /it is no address of the form gs:\/\/bucket\/prefix/),
      refused("gs://serve-test", at("http://127.0.0.1:1"), /cannot be used: connect ECONNREFUSED/),
      refused("gs://serve-test", at(""), /cannot be used: its service's address is none/),
      refused("gs://serve-test", { GOOGLE_APPLICATION_CREDENTIALS: "/none.json" }, /no credentials: .*none\.json/)
    ])
  })
})
