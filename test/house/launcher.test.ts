import { type ChildProcess, spawn } from "node:child_process"
import { once } from "node:events"
import { mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { createInterface } from "node:readline"
import { fileURLToPath } from "node:url"
import { afterAll, describe, expect, test } from "vitest"

const launcher = fileURLToPath(new URL("../../scripts/run.mjs", import.meta.url))
const dir = mkdtempSync(join(tmpdir(), "launcher-"))

afterAll(() => rmSync(dir, { recursive: true }))

/** Starts a program that has this text by the launcher. */
const start = (text: string, args: ReadonlyArray<string> = [], input: "pipe" | "ignore" = "ignore") => {
  const program = join(mkdtempSync(join(dir, "program-")), "program.ts")
  writeFileSync(program, text)
  const child = spawn(process.execPath, [launcher, program, ...args], { stdio: [input, "pipe", "pipe"] })
  const lines = createInterface({ input: child.stdout as NonNullable<ChildProcess["stdout"]> })[Symbol.asyncIterator]()
  let errors = ""
  child.stderr?.on("data", (chunk) => {
    errors += chunk
  })
  return {
    child,
    line: async () => (await lines.next()).value as string,
    errors: () => errors,
    end: async () => (await once(child, "exit")) as [number | null, NodeJS.Signals | null]
  }
}

const waits = `
  let received = 0
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    process.on(signal, () => {
      received++
      setTimeout(() => {
        console.log(signal, received)
        process.exit(3)
      }, 700)
    })
  }
  setInterval(() => {}, 1_000)
  console.log(process.pid)
`

describe("the launcher", () => {
  test("runs TypeScript on the Node of the project, with the arguments, silently", async () => {
    const { end, errors, line } = start("console.log(process.version, ...process.argv.slice(2))", [
      "--port",
      "9000",
      "a b"
    ])
    expect(await line()).toBe(`${process.version} --port 9000 a b`)
    expect(await end()).toEqual([0, null])
    expect(errors()).toBe("")
  })

  test("hands standard input on", async () => {
    const { child, end, line } = start("process.stdin.pipe(process.stdout)", [], "pipe")
    child.stdin?.end("what was typed\n")
    expect(await line()).toBe("what was typed")
    expect(await end()).toEqual([0, null])
  })

  test("asks for huge pages unless told otherwise", async () => {
    const { line } = start("console.log(process.env.GLIBC_TUNABLES, process.env.RUVECTOR_LAUNCHER)")
    expect(await line()).toBe(
      `${process.env["GLIBC_TUNABLES"] ?? (process.platform === "linux" ? "glibc.malloc.hugetlb=1" : undefined)} undefined`
    )
  })

  test("ends with the program's exit code", async () => {
    expect(await start("process.exit(7)").end()).toEqual([7, null])
  })

  test("ends by the signal that ended the program", async () => {
    expect(await start(`process.kill(process.pid, "SIGKILL")`).end()).toEqual([null, "SIGKILL"])
  })

  test.each(["SIGINT", "SIGTERM", "SIGHUP"] as const)("passes %s on once and waits for the program", async (signal) => {
    const { child, end, line } = start(waits)
    await line()
    child.kill(signal)
    // npm passes on a signal that the terminal has already sent.
    setTimeout(() => child.kill(signal), 20)
    expect(await line()).toBe(`${signal} 1`)
    expect(await end()).toEqual([3, null])
  })

  test("leaves no program behind when it is killed", async () => {
    const { child, line } = start(waits)
    await line()
    child.kill("SIGKILL")
    expect(await line()).toBe("SIGTERM 1")
    // Its output ends with it.
    expect(await line()).toBeUndefined()
  })
})
