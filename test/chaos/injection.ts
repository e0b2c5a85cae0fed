/** How a fault is done to a cluster, and undone. */
import type { ClusterNode, Nodes } from "./Nodes.ts"
import type { Fault } from "./Schedule.ts"

export interface Injection {
  readonly apply: () => void | Promise<void>
  /** Until all is as it was: a process that ended is ready again. */
  readonly undo: () => void | Promise<void>
}

export const injectionOf = ({ amountMillis, kind, targets }: Fault, nodes: Nodes): Injection => {
  const [first = "", second = ""] = targets
  const node = () => nodeOf(nodes, first)
  switch (kind) {
    case "kill":
      return { apply: async () => void (await node().end("SIGKILL")), undo: () => node().start() }
    case "term":
      return {
        apply: async () => {
          const code = await node().end("SIGTERM")
          if (code !== 0) throw new Error(`${first} ended with ${code} by SIGTERM`)
        },
        undo: () => node().start()
      }
    case "freeze":
      return { apply: () => node().freeze(), undo: () => node().thaw() }
    case "partition":
      return { apply: () => nodes.network.part(first, second), undo: () => nodes.network.join(first, second) }
    case "isolate": {
      const others = [...nodes.all.map(({ name }) => name).filter((name) => name !== first), "postgres", "redis"]
      return {
        apply: () => {
          for (const other of others) nodes.network.part(first, other)
        },
        undo: () => {
          for (const other of others) nodes.network.join(first, other)
        }
      }
    }
    case "postgresRestart":
      return { apply: () => nodes.postgres.restart(), undo: () => {} }
    case "postgresDown":
      return { apply: () => nodes.postgres.kill(), undo: () => nodes.postgres.start() }
    case "redisKill":
      return { apply: () => nodes.redis.kill(), undo: () => nodes.redis.start() }
    case "slowDisk":
      return {
        apply: () => node().weather({ diskMillis: amountMillis }),
        undo: () => node().weather({ diskMillis: 0 })
      }
    case "clockSkew":
      return {
        apply: () => node().weather({ skewMillis: amountMillis }),
        undo: () => node().weather({ skewMillis: 0 })
      }
  }
}

const nodeOf = (nodes: Nodes, name: string): ClusterNode => {
  const node = nodes.all.find((one) => one.name === name)
  if (node === undefined) throw new Error(`there is no node ${name}`)
  return node
}
