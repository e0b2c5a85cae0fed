/** One of the agents of `main.ts`, a process of its own: what it learns is known to the others as soon as it is written. */
import { once } from "node:events"
import { VectorDB } from "ruvector-streaming"
import { embed } from "../embed.mjs"

export interface Task {
  readonly text: string
}

export interface Done extends Task {
  readonly id: string
  readonly by: string
  readonly answer: string
  /** The agent that did a similar task before. */
  readonly rememberedFrom?: string
}

interface Memory extends Task {
  readonly by: string
  readonly answer: string
}

const [name = "agent", endpoint = "http://127.0.0.1:8080"] = process.argv.slice(2)
await using db = new VectorDB<Memory>({ endpoint, collection: "task-memory" })

/** Tasks whose texts score higher than this are taken to be the same. */
const similar = 0.4

const perform = async (id: string, { text }: Task): Promise<Done> => {
  const vector = embed(text)
  const [nearest] = await db.search(vector, { k: 1 })
  const known = nearest !== undefined && nearest.score > similar ? nearest.metadata : undefined
  // Here an agent would think.
  const answer = known?.answer ?? `solved by ${name}`
  await db.insert(id, vector, { metadata: { text, by: name, answer } })
  return { id, text, by: name, answer, ...(known === undefined ? {} : { rememberedFrom: known.by }) }
}

// Until `main.ts` lets go of it.
const over = new AbortController()
void once(process, "disconnect").then(() => over.abort())

await db.tasks<Task>("support").work(
  async ({ id, task }) => {
    const done = await perform(id, task)
    // The id of the task is the message's: told twice, it is published once.
    await db.channel<Done>("agent-coordination").publish(done, { key: name, id })
    return done.answer
  },
  { agent: name, signal: over.signal }
)
