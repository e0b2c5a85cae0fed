// Does three tasks with the flow of `coordination.mjs`, then asks for those similar to a fourth.
// The service it asks is https://ruvector.example.com: put yours there.

import { findSimilarTasks, flow } from "./coordination.mjs"
import { embedTask } from "./embedTask.mjs"

const titles = {
  "t-1": "Translate the manual into French",
  "t-2": "Water the plants in the office",
  "t-3": "Translate the French letter of the customer"
}

for (const [id, title] of Object.entries(titles)) {
  await flow.run({ id, title }, async () => ({ words: title.split(" ").length }))
}

await findSimilarTasks({ embedding: await embedTask({ title: "Translate a French manual" }) })
console.log((await flow.vectorStore.get("t-1"))?.metadata)
await flow.vectorStore.close()
