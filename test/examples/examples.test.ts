/** Examples do what they say, each as it stands, with the package installed. */
import { type ChildProcess, execFile, spawn } from "node:child_process"
import { once } from "node:events"
import { cp, readFile, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { createInterface } from "node:readline"
import { promisify } from "node:util"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { makeCertificate } from "../support/Certificates.ts"
import { startChromium, withoutChromium } from "../support/Chromium.ts"
import { startConnectProxy } from "../support/ConnectProxy.ts"
import { type InstalledPackage, installedPackage } from "../support/InstalledPackage.ts"
import { type RunningNode, startNode } from "../support/Node.ts"

const examples = new URL("../../examples", import.meta.url).pathname
const timeout = 120_000

describe("examples", () => {
  let installed: InstalledPackage
  let node: RunningNode
  beforeAll(async () => {
    installed = await installedPackage()
    await cp(examples, join(installed.directory, "examples"), { recursive: true })
    node = await startNode()
  }, timeout)
  afterAll(async () => {
    await node?.stop()
    await installed?.remove()
  })

  /** What one prints. */
  const output = async (path: string, args: ReadonlyArray<string>, environment: NodeJS.ProcessEnv = {}) => {
    const { stdout } = await promisify(execFile)(process.execPath, [join("examples", path), ...args], {
      cwd: installed.directory,
      env: { ...process.env, ...environment },
      timeout: 40_000
    })
    return stdout
  }

  it("task-memory: what one process has learnt any of them remembers", { timeout }, async () => {
    const lines = (await output("task-memory/main.ts", [node.base])).trimEnd().split("\n")
    const told = lines.map((line) =>
      /^(\w+) (worked it out|remembered it from (\w+)): (.*) -> solved by (\w+)$/.exec(line)
    )
    const [morning, afternoon] = [told.slice(0, 3), told.slice(3)]
    // Whoever took a task of the morning has solved it; of the afternoon each is known from the one that is like it.
    const solvers = new Map(
      morning.map((line) => [/password|invoice|pictures/i.exec(line?.[4] ?? "")?.[0].toLowerCase(), line])
    )
    assert.deepStrictEqual([...solvers.keys()].sort(), ["invoice", "password", "pictures"])
    for (const line of morning) assert.deepStrictEqual([line?.[2], line?.[5]], ["worked it out", line?.[1]])
    assert.strictEqual(afternoon.length, 3)
    for (const line of afternoon) {
      const solver = solvers.get(/password|invoice|pictures/i.exec(line?.[4] ?? "")?.[0].toLowerCase())?.[1]
      assert.deepStrictEqual([line?.[3], line?.[5]], [solver, solver])
    }
  })

  it("wake: the agent is woken by what it looks after, and by nothing else", { timeout }, async () => {
    const lines = (await output("wake.ts", [node.base])).split("\n").filter((line) => line !== "")
    const woken = lines.filter((line) => line.startsWith("woken by:"))
    assert.deepStrictEqual(woken, [
      "woken by: A payment by card failed twice",
      "woken by: Payments failed for a whole hour",
      "woken by: The last payment failed as well"
    ])
    assert.strictEqual(lines.at(-1), "done: last")
  })

  it.skipIf(withoutChromium())(
    "live-page: what is written on one page is found on another as it comes",
    { timeout },
    async () => {
      const server: ChildProcess = spawn(
        process.execPath,
        [join(installed.directory, "examples/live-page/server.ts"), node.base],
        { stdio: ["ignore", "pipe", "inherit"] }
      )
      const exited = once(server, "exit")
      const browser = await startChromium()
      try {
        const [url] = (await once(createInterface({ input: server.stdout! }), "line")) as [string]
        const [reader, writer] = [await browser.newPage(), await browser.newPage()]
        const errors: Array<string> = []
        for (const page of [reader, writer]) {
          page.on("pageerror", (error) => errors.push(error.message))
          await page.goto(url)
          await page.waitForSelector("body[data-ready]")
        }
        await reader.fill("#query", "translate a letter")
        for (const note of ["Translate the long letter", "Water the garden", "A letter to translate"]) {
          await writer.fill("[name=note]", note)
          await writer.press("[name=note]", "Enter")
        }
        await reader.waitForFunction("document.querySelectorAll('#nearest li').length === 2")
        const rows = await reader.locator("#nearest li span:first-child").allTextContents()
        assert.deepStrictEqual(rows.sort(), ["A letter to translate", "Translate the long letter"])
        await reader.fill("#query", "garden water")
        await reader.waitForFunction("document.querySelector('#nearest li')?.innerText.includes('garden')")
        assert.deepStrictEqual(await reader.locator("#nearest li span:first-child").allTextContents(), [
          "Water the garden"
        ])
        assert.deepStrictEqual(errors, [])
      } finally {
        await browser.close()
        server.kill()
        await exited
      }
    }
  )

  describe("agentic-flow", () => {
    it("is as the document has it, but for imports and exports", async () => {
      const text = await readFile(join(examples, "agentic-flow/coordination.mjs"), "utf8")
      const own = text.split("\n").filter((line) => !/^(?:import|export) |^\/\/ @ts-nocheck/.test(line))
      const plain = (code: string) => code.replaceAll(/\s+/g, " ").trim()
      assert.strictEqual(plain(own.join("\n")), plain(asWritten))
    })

    it("runs against the service that it names, over TLS", { timeout }, async () => {
      const { cert, key } = makeCertificate("ruvector", "ruvector.example.com")
      const [tlsCert, tlsKey] = ["cert.pem", "key.pem"].map((name) => join(installed.directory, name)) as [
        string,
        string
      ]
      await writeFile(tlsCert, cert)
      await writeFile(tlsKey, key)
      const secure = await startNode({ tlsCert, tlsKey })
      const proxy = await startConnectProxy(secure.port)
      try {
        const printed = await output("agentic-flow/main.mjs", [], {
          NODE_USE_ENV_PROXY: "1",
          HTTPS_PROXY: proxy.url,
          NO_PROXY: "",
          NODE_EXTRA_CA_CERTS: tlsCert
        })
        const [first, second, third, metadata] = printed.split("\n")
        assert.match(first ?? "", /^Similar task: t-1, score: 0\.\d+$/)
        assert.match(second ?? "", /^Similar task: t-3, score: 0\.\d+$/)
        assert.match(third ?? "", /^Similar task: t-2, score: /)
        assert.strictEqual(metadata, "{ type: 'task', status: 'completed', result: { words: 5 } }")
        assert.deepStrictEqual([...proxy.asked], ["ruvector.example.com:443"])
      } finally {
        proxy.close()
        await secure.stop()
      }
    })
  })
})

/** Section 10.1 of the architecture document, without its two lines that import. */
const asWritten = `
// Initialize distributed vector memory
const flow = new AgenticFlow({
  vectorStore: new VectorDB({
    endpoint: 'https://ruvector.example.com',
    region: 'auto', // auto-selects nearest region
    streaming: true,
  }),
  topology: 'mesh',
  coordinationHooks: {
    preTask: async (task) => {
      // Store task embedding for similarity search
      const embedding = await embedTask(task);
      await flow.vectorStore.insert(task.id, embedding, { metadata: { type: 'task', status: 'pending' } });
    },
    postTask: async (task, result) => {
      // Update task with result
      await flow.vectorStore.update(task.id, { metadata: { status: 'completed', result } });
    }
  }
});

// Distributed agent search for similar tasks
async function findSimilarTasks(currentTask) {
  const stream = flow.vectorStore.searchStream(
    currentTask.embedding,
    { k: 10, filter: { type: 'task' } }
  );
  for await (const result of stream) {
    console.log(\`Similar task: \${result.id}, score: \${result.score}\`);
  }
}
`
