/**
 * Stands in for the class `AgenticFlow` of the npm package `agentic-flow`, as the architecture document uses it: no version
 * of that package that is published (2.1.3 and 3.0.0-alpha.2 are the newest) exports such a class, nor anything that takes
 * a vector store and hooks. What the document says of it is here: a store that agents share, and hooks around each task.
 */

/** What agents are to each other; in a mesh any may find the tasks of any other in the store. */
export type Topology = "mesh"

export interface AgenticFlowOptions<Store, Task, Result> {
  /** Where agents find each other's tasks. */
  readonly vectorStore: Store
  readonly topology: Topology
  readonly coordinationHooks?: {
    /** Before a task; where it rejects, the task is not begun. */
    readonly preTask?: (task: Task) => Promise<void>
    /** After a task that was done, with what came of it. */
    readonly postTask?: (task: Task, result: Result) => Promise<void>
  }
}

export class AgenticFlow<Store, Task, Result> {
  readonly vectorStore: Store
  readonly topology: Topology
  readonly #hooks: NonNullable<AgenticFlowOptions<Store, Task, Result>["coordinationHooks"]>

  constructor({ vectorStore, topology, coordinationHooks = {} }: AgenticFlowOptions<Store, Task, Result>) {
    if (topology !== "mesh") throw new TypeError(`topology: expected "mesh", got ${JSON.stringify(topology)}`)
    this.vectorStore = vectorStore
    this.topology = topology
    this.#hooks = coordinationHooks
  }

  /** Does a task between its hooks. */
  async run(task: Task, work: (task: Task) => Promise<Result>): Promise<Result> {
    await this.#hooks.preTask?.(task)
    const result = await work(task)
    await this.#hooks.postTask?.(task, result)
    return result
  }
}
