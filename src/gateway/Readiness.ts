/** Whether this node should be sent requests: not before what was asked for at start is resident, and not once it drains. */
import { Context, Layer } from "effect"

export type State =
  | { readonly state: "starting"; readonly detail: string }
  | { readonly state: "ready" }
  | { readonly state: "failed"; readonly detail: string }
  | { readonly state: "draining" }

export class Readiness extends Context.Service<
  Readiness,
  {
    readonly get: () => State
    readonly set: (state: State) => void
    /** Calls back after each change, until what it gives back is called. */
    readonly onChange: (listener: () => void) => () => void
  }
>()("ruvector/gateway/Readiness") {
  static readonly layer = Layer.sync(Readiness, () => {
    let state: State = { state: "starting", detail: "opening" }
    const listeners = new Set<() => void>()
    return Readiness.of({
      get: () => state,
      // Draining is final.
      set: (next) => {
        if (state.state === "draining") return
        state = next
        for (const listener of [...listeners]) listener()
      },
      onChange: (listener) => {
        listeners.add(listener)
        return () => listeners.delete(listener)
      }
    })
  })
}
