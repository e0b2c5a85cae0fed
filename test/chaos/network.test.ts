/** The network that chaos parts: what is said to be parted is, and only that, and it comes together again. */
import { spawn } from "node:child_process"
import { assert, describe, it } from "@effect/vitest"
import { openNetwork } from "./Network.ts"

const network = openNetwork(["a", "b", "c"])
const isNamespaced = network.kind === "namespaces"
if (!isNamespaced) {
  console.warn(
    "Networks are not parted in tests: that needs root on Linux, with ip (iproute2) and nsenter (util-linux)."
  )
}

/** Runs a program of Node at a place; its output's first line. */
const run = (place: string, program: string): { readonly line: Promise<string>; readonly end: () => void } => {
  const [command, ...words] = network.command(place, [process.execPath, "-e", program]) as [string, ...Array<string>]
  const child = spawn(command, words, { stdio: ["ignore", "pipe", "inherit"] })
  const line = new Promise<string>((resolve) => {
    let output = ""
    child.stdout.on("data", (chunk: Buffer) => {
      output += chunk.toString()
      if (output.includes("\n")) resolve(output.split("\n")[0] as string)
    })
    child.once("exit", (code) => resolve(`ended with ${code}`))
  })
  return { line, end: () => child.kill("SIGKILL") }
}

const listen = (place: string) =>
  run(
    place,
    `require("net").createServer((s) => s.end("hello")).listen(9000, "${network.addressOf(place)}", () => console.log("listens"))`
  )

/** What a connection from one place to another comes to. */
const call = async (from: string, to: string): Promise<string> => {
  const { end, line } = run(
    from,
    `const s = require("net").connect(9000, "${network.addressOf(to)}");
     s.on("data", (d) => { console.log(String(d)); process.exit() });
     s.on("error", (e) => { console.log(e.code); process.exit() });
     setTimeout(() => { console.log("nothing"); process.exit() }, 1000)`
  )
  const answer = await line
  end()
  return answer
}

describe("the network of chaos", () => {
  if (!isNamespaced) {
    it("is the machine's own, where no other can be made", () => {
      assert.deepStrictEqual(network.command("a", ["node"]), ["node"])
      assert.strictEqual(network.addressOf("a"), "127.0.0.1")
    })
    return
  }
  it("parts two and joins them again; the others speak on", { timeout: 60_000 }, async () => {
    const servers = ["a", "b", "redis"].map(listen)
    try {
      for (const { line } of servers) assert.strictEqual(await line, "listens")
      assert.deepStrictEqual(await Promise.all([call("a", "b"), call("c", "a")]), ["hello", "hello"])
      network.part("a", "b")
      network.part("c", "redis")
      const parted = await Promise.all([
        call("a", "b"),
        call("b", "a"),
        call("c", "a"),
        call("c", "b"),
        call("c", "redis"),
        call("a", "redis")
      ])
      assert.deepStrictEqual(parted, ["nothing", "nothing", "hello", "hello", "nothing", "hello"])
      network.join("a", "b")
      network.join("c", "redis")
      assert.deepStrictEqual(await Promise.all([call("a", "b"), call("b", "a"), call("c", "redis")]), [
        "hello",
        "hello",
        "hello"
      ])
    } finally {
      for (const { end } of servers) end()
      network.close()
    }
  })
})
