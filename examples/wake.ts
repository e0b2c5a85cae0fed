/**
 * An agent that sleeps until something near to what it looks after comes up. It asks nobody again and again: a standing
 * query tells it, also after a cut or a restart of the server.
 *
 *     npx ruvector serve
 *     node examples/wake.ts [http://127.0.0.1:8080]
 */
import { setTimeout as sleep } from "node:timers/promises"
import { VectorDB } from "ruvector-streaming"
import { embed } from "./embed.mjs"

interface Report {
  readonly text: string
  readonly status: "open" | "done"
}

const endpoint = process.argv[2] ?? "http://127.0.0.1:8080"
const db = new VectorDB<Report>({ endpoint, collection: "reports" })
await db.collections.delete("reports")
await db.collections.create("reports", { dimensions: 256 })

/** Looks after payments. What is done is not open any more, and so leaves what it watches. */
const agent = async () => {
  const watched = db.subscribe(embed("payment failed"), { k: 100, minScore: 0.3, filter: { status: "open" } })
  for await (const change of watched) {
    if (change.type === "leave") {
      console.log("done:", change.id)
      if (change.id === "last") break
    }
    if (change.type === "enter") {
      console.log("woken by:", change.metadata.text)
      await db.update(change.id, { metadata: { status: "done" } })
    }
  }
}

const asleep = agent()

for (const [id, text] of [
  ["r1", "A payment by card failed twice"],
  ["r2", "The garden needs water"],
  ["r3", "Payments failed for a whole hour"],
  ["last", "The last payment failed as well"]
] as const) {
  await sleep(50)
  await db.insert(id, embed(text), { metadata: { text, status: "open" } })
}

await asleep
await db.close()
