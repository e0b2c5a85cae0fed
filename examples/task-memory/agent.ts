/** One of the agents of `main.ts`, a process of its own: what it learns is known to the others as soon as it is written. */
import { VectorDB } from "ruvector-streaming"
import { embed } from "../embed.mjs"

export interface Task {
  readonly id: string
  readonly text: string
}

export interface Done {
  readonly by: string
  readonly answer: string
  /** The agent that did a similar task before. */
  readonly rememberedFrom?: string
}

interface Memory {
  readonly type: "task"
  readonly status: "pending" | "done"
  readonly by: string
  readonly text: string
  readonly answer?: string
}

const [name = "agent", endpoint = "http://127.0.0.1:8080"] = process.argv.slice(2)
await using db = new VectorDB<Memory>({ endpoint, collection: "task-memory" })

/** Tasks whose texts score higher than this are taken to be the same. */
const similar = 0.4

const perform = async ({ id, text }: Task): Promise<Done> => {
  const vector = embed(text)
  await db.insert(id, vector, { metadata: { type: "task", status: "pending", by: name, text } })
  const [nearest] = await db.search(vector, { k: 1, filter: { type: "task", status: "done" } })
  const known = nearest !== undefined && nearest.score > similar ? nearest.metadata : undefined
  // Here an agent would think.
  const answer = known?.answer ?? `solved by ${name}`
  await db.update(id, { metadata: { status: "done", answer } })
  return { by: name, answer, ...(known === undefined ? {} : { rememberedFrom: known.by }) }
}

process.on("message", async (task: Task) => process.send?.(await perform(task)))
await new Promise((resolve) => process.once("disconnect", resolve))
