/** The answer of a standing query as its subscriber has it, kept so that whatever the server tells becomes changes of it. */
import type { MemberChange } from "./Engine.ts"

export type Entering = Extract<MemberChange, { readonly type: "enter" | "update" }>

export class Members {
  /** Versions by id. */
  readonly #versions = new Map<string, string>()

  /** The answer is these now. */
  answer(members: ReadonlyArray<Entering>): ReadonlyArray<MemberChange> {
    const ids = new Set(members.map(({ id }) => id))
    return [...this.keep(ids), ...this.apply(members)]
  }

  /** All others have left. */
  keep(ids: ReadonlySet<string>): ReadonlyArray<MemberChange> {
    const leaves: Array<MemberChange> = []
    for (const id of this.#versions.keys()) {
      if (!ids.has(id)) leaves.push({ type: "leave", id })
    }
    for (const { id } of leaves) this.#versions.delete(id)
    return leaves
  }

  /** Changes, without those that are known already. */
  apply(changes: ReadonlyArray<MemberChange>): ReadonlyArray<MemberChange> {
    const news: Array<MemberChange> = []
    for (const change of changes) {
      if (change.type === "leave") {
        if (this.#versions.delete(change.id)) news.push(change)
        continue
      }
      const known = this.#versions.get(change.id)
      this.#versions.set(change.id, change.version)
      if (known === undefined) news.push({ ...change, type: "enter" })
      else if (known !== change.version || change.type === "update") news.push({ ...change, type: "update" })
    }
    return news
  }
}
