/** What is in a node before an exchange: a collection `conf` with two vectors. */
export const prepare = async (base: string): Promise<void> => {
  const send = async (method: string, path: string, body: object) => {
    const headers = { "content-type": "application/json" }
    const response = await fetch(`${base}/api/v1/${path}`, { method, headers, body: JSON.stringify(body) })
    if (!response.ok) throw new Error(`${path}: ${response.status} ${await response.text()}`)
  }
  await send("PUT", "collections/conf", { dimensions: 2 })
  const vectors = [
    { id: "a", vector: [1, 0], metadata: { n: 0 } },
    { id: "b", vector: [0.8, 0.6], metadata: { n: 0 } }
  ]
  await send("POST", "insert", { collection: "conf", vectors })
}
