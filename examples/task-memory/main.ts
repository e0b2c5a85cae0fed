/**
 * A memory that agents share: three processes take tasks from one queue, and each looks first whether any of them has done a
 * similar one. An agent that dies loses its lease: another does the task.
 *
 *     npx ruvector serve
 *     node examples/task-memory/main.ts [http://127.0.0.1:8080]
 */
import { fork } from "node:child_process"
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

await using db = new VectorDB({ endpoint })
await db.collections.delete("task-memory")
await db.collections.create("task-memory", { dimensions: 256 })
await db.topics.delete("support")
await db.topics.create("support", { leaseMillis: 5_000 })
const tasks = db.tasks<Task>("support")

const agents = ["ada", "bob", "cyd"].map((name) => fork(new URL("agent.ts", import.meta.url), [name, endpoint]))

/** Has them done by whoever is free, and tells how. */
const done = async (texts: ReadonlyArray<string>) => {
  const ids = await tasks.enqueueMany(texts.map((text) => ({ task: { text } })))
  const left = new Set(ids)
  // Agents tell of what they have done on the topic that is there for that.
  for await (const { message } of db
    .channel<Done>("agent-coordination")
    .subscribe({ subscriber: "main", from: "oldest" })) {
    if (!left.delete(message.id)) continue
    const how = message.rememberedFrom === undefined ? "worked it out" : `remembered it from ${message.rememberedFrom}`
    console.log(`${message.by} ${how}: ${message.text} -> ${message.answer}`)
    if (left.size === 0) break
  }
}

await done(morning)
await done(afternoon)
for (const agent of agents) agent.disconnect()
