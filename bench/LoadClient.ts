/** A client process (`load.ts`) as its parent sees it. */
import { type ChildProcess, fork } from "node:child_process"
import { once } from "node:events"
import { fileURLToPath } from "node:url"
import type { Outcomes, Reply, Request, Task } from "./load.ts"
import type { DataOptions } from "./words.ts"

export class LoadClient {
  readonly #process: ChildProcess
  readonly #waiting = new Map<number, (reply: Omit<Reply, "id">) => void>()
  #tasks = 0

  constructor(data: DataOptions) {
    this.#process = fork(fileURLToPath(new URL("load.ts", import.meta.url)), [JSON.stringify(data)])
    this.#process.on("message", ({ id, ...rest }: Reply) => {
      this.#waiting.get(id)?.(rest)
      this.#waiting.delete(id)
    })
    this.#process.on("exit", (code, signal) => {
      for (const settle of this.#waiting.values()) settle({ failure: `the client process ended (${signal ?? code})` })
    })
  }

  run<Type extends Task["type"]>(task: Extract<Task, { type: Type }>): Promise<Outcomes[Type]> {
    const id = this.#tasks++
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, ({ outcome, failure }) => {
        if (failure === undefined) resolve(outcome as Outcomes[Type])
        else reject(new Error(`${task.type} against ${"url" in task ? task.url : "the server"}: ${failure}`))
      })
      this.#process.send({ id, task } satisfies Request)
    })
  }

  async close(): Promise<void> {
    if (this.#process.exitCode !== null || this.#process.signalCode !== null) return
    this.#process.disconnect()
    await once(this.#process, "exit")
  }
}
