/** The command line as a user meets it: one clear line and exit code 1 where it cannot start, a clean end where it can. */
import { chmod, mkdir, readFile, stat, writeFile } from "node:fs/promises"
import * as net from "node:net"
import { join } from "node:path"
import { assert, describe, it } from "@effect/vitest"
import { flagOf, type SettingName, settings, variableOf } from "../../src/config.ts"
import { ready, runServe, startServer, withDirectory } from "../support/ServerProcess.ts"
import { SocketClient } from "../support/Streams.ts"

const oneLine = (text: string) => {
  const lines = text.trim().split("\n")
  assert.strictEqual(lines.length, 1, text)
  return lines[0] as string
}

describe("serve", () => {
  it("says where it listens, where data lies, and a first curl that works", { timeout: 60_000 }, () =>
    withDirectory(async (directory) => {
      const server = await startServer(directory)
      await ready(server.base)
      assert.include(server.output(), server.base)
      assert.include(server.output(), directory)
      const insert = /--json '([^']+)' (http\S+)/.exec(server.output())
      const inserted = await fetch(insert?.[2] as string, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: insert?.[1] as string
      })
      assert.deepStrictEqual(await inserted.json(), { inserted: 2 })
      const search = /curl -N '([^']+)'/.exec(server.output())?.[1] as string
      assert.include(await (await fetch(search)).text(), '"vector_id":"a"')
      assert.strictEqual(await server.stop("SIGTERM"), 0)
      const again = await startServer(directory)
      await ready(again.base)
      assert.include(await (await fetch(search.replace(server.base, again.base))).text(), '"vector_id":"b"')
      assert.strictEqual(await again.stop("SIGINT"), 0)
    })
  )

  it("tells streams to come back, and ends within the drain time, when it is told to stop", { timeout: 60_000 }, () =>
    withDirectory(async (directory) => {
      const server = await startServer(directory)
      await ready(server.base)
      const client = await SocketClient.open(server.base)
      await client.ask({ type: "insert", vectors: [{ id: "a", vector: [1, 0] }] })
      const stream = await fetch(`${server.base}/api/v1/stream/search?query_vector_id=a&keep_open=true`)
      const text = stream.text()
      assert.strictEqual(await server.stop("SIGTERM"), 0)
      const { code, reason } = await client.closed
      assert.strictEqual(code, 1012)
      assert.match(reason, /^restarting, retry=\d+$/)
      assert.match(await text, /retry: \d+\nevent: bye/)
    })
  )

  it(
    "snapshots what it holds when it is told to stop, so that the next start replays nothing",
    { timeout: 60_000 },
    () =>
      withDirectory(async (data) => {
        const server = await startServer(data, ["--snapshot-idle-millis", "3600000"])
        const vectors = Array.from({ length: 50 }, (_, i) => ({ id: `v${i}`, vector: [1, i] }))
        const inserted = await fetch(`${server.base}/api/v1/insert`, {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify({ vectors })
        })
        assert.strictEqual(inserted.status, 200)
        assert.strictEqual(await server.stop("SIGTERM"), 0)
        const again = await startServer(data)
        await ready(again.base)
        assert.match(again.output(), /"records":50,"replayed":0/)
        assert.strictEqual(await again.stop("SIGTERM"), 0)
      })
  )

  it("answers a request that had begun to arrive before it was told to stop", { timeout: 60_000 }, () =>
    withDirectory(async (directory) => {
      const server = await startServer(directory)
      await ready(server.base)
      const body = '{"vectors":[{"id":"a","vector":[1,0]}]}'
      const socket = net.connect(server.port, "127.0.0.1")
      const head = `POST /api/v1/insert HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: ${body.length}`
      let text = ""
      socket.on("data", (chunk) => {
        text += chunk.toString()
      })
      socket.write(`${head}\r\n\r\n${body.slice(0, 10)}`)
      await new Promise((resolve) => setTimeout(resolve, 300))
      const stopped = server.stop("SIGTERM")
      await new Promise((resolve) => setTimeout(resolve, 300))
      socket.write(body.slice(10))
      assert.strictEqual(await stopped, 0)
      assert.match(text, /^HTTP\/1\.1 200 /)
      const again = await startServer(directory)
      await ready(again.base)
      assert.strictEqual((await fetch(`${again.base}/api/v1/embed/a`)).status, 200)
      await again.stop("SIGTERM")
    })
  )

  it("--help lists every setting, its default and its variable", { timeout: 60_000 }, async () => {
    const { code, stdout } = await runServe(["--help"])
    assert.strictEqual(code, 0)
    const plain = stdout.replace(/\s+/g, " ")
    for (const name of Object.keys(settings) as Array<SettingName>) {
      assert.include(plain, `--${flagOf(name)}`)
      assert.include(plain, variableOf(name))
    }
  })

  it("refuses a setting out of its bound", { timeout: 60_000 }, async () => {
    const flag = await runServe(["--max-body-bytes", "12"])
    assert.strictEqual(flag.code, 1)
    assert.match(oneLine(flag.stderr), /--max-body-bytes: expected an integer from 1024 to \d+, got "12"/)
    const variable = await runServe([], { RUVECTOR_LOG_LEVEL: "loud" })
    assert.strictEqual(variable.code, 1)
    assert.match(oneLine(variable.stderr), /RUVECTOR_LOG_LEVEL: expected one of .*debug/)
  })

  it("port taken", { timeout: 60_000 }, () =>
    withDirectory(async (directory) => {
      const other = net.createServer().listen(0, "127.0.0.1")
      await new Promise((resolve) => other.once("listening", resolve))
      const { port } = other.address() as net.AddressInfo
      const { code, stderr } = await runServe(["--port", String(port), "--data", directory, "--log-level", "error"])
      other.close()
      assert.strictEqual(code, 1)
      assert.match(oneLine(stderr), new RegExp(`Port ${port} .*taken`))
    })
  )

  it("data locked by another process, named by its pid", { timeout: 60_000 }, () =>
    withDirectory(async (directory) => {
      const server = await startServer(directory)
      const { code, stderr } = await runServe(["--port", "0", "--data", directory])
      assert.strictEqual(code, 1)
      assert.include(oneLine(stderr), String(server.pid))
      // A holder that was killed holds nothing.
      await server.stop("SIGKILL")
      const next = await startServer(directory)
      assert.strictEqual(await next.stop("SIGTERM"), 0)
    })
  )

  it("data of a newer format, a file in its place, a directory that cannot be written", { timeout: 60_000 }, () =>
    withDirectory(async (directory) => {
      const newer = join(directory, "newer")
      const first = await startServer(newer)
      await first.stop("SIGTERM")
      const format = JSON.parse(await readFile(join(newer, "FORMAT"), "utf8")) as { format: number }
      await writeFile(join(newer, "FORMAT"), JSON.stringify({ ...format, format: format.format + 1 }))
      const refused = await runServe(["--port", "0", "--data", newer])
      assert.strictEqual(refused.code, 1)
      assert.match(oneLine(refused.stderr), /newer/)

      const file = join(directory, "file")
      await writeFile(file, "")
      const onFile = await runServe(["--port", "0", "--data", file])
      assert.strictEqual(onFile.code, 1)
      assert.include(oneLine(onFile.stderr), file)

      // Root may write anywhere on a disk, but nowhere in /proc.
      const readonly = join(directory, "readonly")
      await mkdir(readonly)
      await chmod(readonly, 0o500)
      const place = process.getuid?.() === 0 ? "/proc/ruvector" : readonly
      const unwritable = await runServe(["--port", "0", "--data", place])
      assert.strictEqual(unwritable.code, 1)
      assert.include(oneLine(unwritable.stderr), place)
      assert.isTrue((await stat(readonly)).isDirectory())
    })
  )
})
