/** `keys create | list | revoke` as an operator types them, before there is a node and while one runs. */
import { spawn } from "node:child_process"
import { assert, describe, it } from "vitest"
import { ready, startServer, withDirectory } from "../support/ServerProcess.ts"

const main = new URL("../../src/main.ts", import.meta.url).pathname

const run = (...words: ReadonlyArray<string>): Promise<{ code: number | null; stdout: string; stderr: string }> =>
  new Promise((resolve) => {
    const child = spawn(process.execPath, [main, "keys", ...words], { stdio: ["ignore", "pipe", "pipe"] })
    let stdout = ""
    let stderr = ""
    child.stdout.on("data", (chunk: Buffer) => (stdout += chunk.toString()))
    child.stderr.on("data", (chunk: Buffer) => (stderr += chunk.toString()))
    child.once("exit", (code) => resolve({ code, stdout, stderr }))
  })

const statusOf = (base: string, key: string): Promise<number> =>
  fetch(`${base}/api/v1/collections`, { headers: { authorization: `Bearer ${key}` } }).then(({ status }) => status)

describe("keys", () => {
  it("are made before a node starts, and made and revoked while it runs", { timeout: 60_000 }, async () => {
    await withDirectory(async (directory) => {
      const data = `${directory}/data`
      const first = await run("create", "--data", data, "--name", "first", "--scopes", "read,write,admin")
      assert.strictEqual(first.code, 0, first.stderr)
      const key = first.stdout.trim()
      assert.match(key, /^rvk_[0-9a-z]{16}_[A-Za-z0-9_-]{43}$/)

      // With a key there, a node may listen to other machines.
      const server = await startServer(data, ["--anonymous-access", "off", "--key-refresh-millis", "500"])
      try {
        await ready(server.base)
        assert.strictEqual(await statusOf(server.base, key), 200)
        const second = (await run("create", "--data", data, "--name", "second", "--tenant", "acme")).stdout.trim()
        assert.strictEqual(await statusOf(server.base, second), 200)

        const listed = await run("list", "--data", data, "--json")
        const keys = listed.stdout
          .trim()
          .split("\n")
          .map((line) => JSON.parse(line))
        assert.deepStrictEqual(
          keys.map(({ name, tenant, scopes }) => [name, tenant, scopes]),
          [
            ["first", "default", ["read", "write", "admin"]],
            ["second", "acme", ["read"]]
          ]
        )
        assert.notInclude(listed.stdout, "hash")
        assert.match((await run("list", "--data", data)).stdout, /acme +read +standard +good/)

        const revoked = await run("revoke", keys[1].id, "--data", data)
        assert.strictEqual(revoked.code, 0, revoked.stderr)
        const end = Date.now() + 10_000
        while ((await statusOf(server.base, second)) !== 401) assert.isBelow(Date.now(), end, "it still works")
        assert.strictEqual(await statusOf(server.base, key), 200)
        assert.notInclude(server.output(), key.slice(21))
      } finally {
        await server.stop("SIGTERM")
      }
    })
  })

  it("that cannot be are refused with one line", { timeout: 60_000 }, async () => {
    await withDirectory(async (directory) => {
      for (const [words, line] of [
        [["create", "--data", directory, "--name", "n", "--scopes", "all"], /--scopes: expected/],
        [["create", "--data", directory, "--name", "n", "--tenant", "A"], /--tenant: expected a tenant's name/],
        [["list", "--data", `${directory}/none`], /there is no data directory/],
        [["revoke", "0000000000000000", "--data", `${directory}/none`], /there is no data directory/]
      ] as const) {
        const { code, stderr } = await run(...words)
        assert.strictEqual(code, 1, stderr)
        assert.match(stderr, line)
        assert.strictEqual(stderr.trim().split("\n").length, 1)
      }
    })
  })
})
