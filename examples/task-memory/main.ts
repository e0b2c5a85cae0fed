/**
 * A memory that agents share: three processes do tasks, and each looks first whether any of them has done a similar one.
 *
 *     npx ruvector serve
 *     node examples/task-memory/main.ts [http://127.0.0.1:8080]
 */
import { type ChildProcess, fork } from "node:child_process"
import { once } from "node:events"
import { VectorDB } from "ruvector-streaming"
import type { Done, Task } from "./agent.ts"

const endpoint = process.argv[2] ?? "http://127.0.0.1:8080"

const morning = [
  "A customer forgot the password of her account",
  "The invoice of March shows the wrong address",
  "Pictures are not shown in the mobile application"
]

const afternoon = [
  "No pictures in the application on a mobile telephone",
  "The password of a customer account is forgotten again",
  "An invoice was sent with the wrong address in it"
]

const db = new VectorDB({ endpoint })
await db.collections.delete("task-memory")
await db.collections.create("task-memory", { dimensions: 256 })
await db.close()

const agents = ["ada", "bob", "cyd"].map((name) => fork(new URL("agent.ts", import.meta.url), [name, endpoint]))

/** One task each; all are done when it resolves. */
const hand = (texts: ReadonlyArray<string>, part: string) =>
  Promise.all(
    agents.map(async (agent: ChildProcess, i) => {
      const task: Task = { id: `${part}-${i}`, text: texts[i] as string }
      agent.send(task)
      const [done] = (await once(agent, "message")) as [Done]
      const how = done.rememberedFrom === undefined ? "worked it out" : `remembered it from ${done.rememberedFrom}`
      return `${done.by} ${how}: ${task.text} -> ${done.answer}`
    })
  )

for (const line of [...(await hand(morning, "morning")), ...(await hand(afternoon, "afternoon"))]) console.log(line)
for (const agent of agents) agent.disconnect()
