/**
 * The network between the nodes of a cluster and what they need, in which any two can be parted. Where the machine lets us, each
 * node is in a network namespace of its own, on one bridge, and two are parted by taking from each the other's hardware address:
 * what one sends gets lost without a word, as in a network that fails. Elsewhere the nodes share the loopback device, and only
 * processes can be made to fail.
 */
import { spawnSync } from "node:child_process"
import { readdirSync } from "node:fs"

export interface Network {
  readonly kind: "namespaces" | "loopback"
  /** Address of a place. */
  readonly addressOf: (place: string) => string
  /** The words of a command that runs it at a place. */
  readonly command: (place: string, words: ReadonlyArray<string>) => ReadonlyArray<string>
  /** Nothing passes from one to the other, nor back. */
  readonly part: (a: string, b: string) => void
  readonly join: (a: string, b: string) => void
  readonly close: () => void
}

/** What is outside of the namespaces: the clients and the services. */
export type Outside = "clients" | "postgres" | "redis"

const outsides: ReadonlyArray<Outside> = ["clients", "postgres", "redis"]

/** The best that the machine allows. `nodes`: names of the places in namespaces. */
export const openNetwork = (nodes: ReadonlyArray<string>): Network => namespaces(nodes) ?? loopback

const loopback: Network = {
  kind: "loopback",
  addressOf: () => "127.0.0.1",
  command: (_, words) => words,
  part: () => {},
  join: () => {},
  close: () => {}
}

const prefix = "rvchaos"

/** An address that no interface has. */
const nowhere = "02:00:00:00:00:99"

const ip = (...words: ReadonlyArray<string>): boolean => spawnSync("ip", words, { stdio: "ignore" }).status === 0

const namespaces = (nodes: ReadonlyArray<string>): Network | undefined => {
  if (process.platform !== "linux" || process.getuid?.() !== 0) return undefined
  removeAbandoned()
  const own = `${prefix}${process.pid}`
  const subnet = `10.${200 + ((process.pid >> 8) % 50)}.${process.pid & 255}`
  const bridge = `rvb${process.pid}`
  const hosts = new Map<string, string>()
  for (const [n, name] of outsides.entries()) hosts.set(name, `${subnet}.${n + 1}`)
  for (const [n, name] of nodes.entries()) hosts.set(name, `${subnet}.${n + 11}`)
  const addressOf = (place: string): string => {
    const address = hosts.get(place)
    if (address === undefined) throw new Error(`there is no place ${place}`)
    return address
  }
  const spaceOf = (node: string) => `${own}-${node}`
  const close = () => {
    for (const node of nodes) ip("netns", "del", spaceOf(node))
    ip("link", "del", bridge)
  }

  const isMade =
    ip("link", "add", bridge, "type", "bridge") &&
    outsides.every((name) => ip("addr", "add", `${addressOf(name)}/24`, "dev", bridge)) &&
    ip("link", "set", bridge, "up") &&
    nodes.every((node, n) => {
      const space = spaceOf(node)
      const outer = `rvv${process.pid}n${n}`
      return (
        ip("netns", "add", space) &&
        ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space) &&
        ip("link", "set", outer, "master", bridge, "up") &&
        ip("-n", space, "addr", "add", `${addressOf(node)}/24`, "dev", "eth0") &&
        ip("-n", space, "link", "set", "eth0", "up") &&
        ip("-n", space, "link", "set", "lo", "up")
      )
    })
  if (!isMade) {
    close()
    return undefined
  }
  process.once("exit", close)

  const isNode = (place: string): boolean => nodes.includes(place)
  const each = (a: string, b: string, act: (space: string, other: string) => void) => {
    if (isNode(a)) act(spaceOf(a), addressOf(b))
    if (isNode(b)) act(spaceOf(b), addressOf(a))
  }
  return {
    kind: "namespaces",
    addressOf,
    command: (place, words) =>
      isNode(place) ? ["nsenter", `--net=/run/netns/${spaceOf(place)}`, "--", ...words] : words,
    part: (a, b) =>
      each(a, b, (space, other) => {
        ip("-n", space, "neigh", "replace", other, "lladdr", nowhere, "dev", "eth0", "nud", "permanent")
      }),
    join: (a, b) =>
      each(a, b, (space, other) => {
        ip("-n", space, "neigh", "del", other, "dev", "eth0")
      }),
    close: () => {
      process.removeListener("exit", close)
      close()
    }
  }
}

/** Namespaces of runs that were killed. */
const removeAbandoned = (): void => {
  let names: ReadonlyArray<string> = []
  try {
    names = readdirSync("/run/netns")
  } catch {
    return
  }
  for (const name of names) {
    const pid = Number(new RegExp(`^${prefix}(\\d+)-`).exec(name)?.[1])
    if (!(pid > 0) || isRunning(pid)) continue
    ip("netns", "del", name)
    ip("link", "del", `rvb${pid}`)
  }
}

const isRunning = (pid: number): boolean => {
  try {
    process.kill(pid, 0)
    return true
  } catch {
    return false
  }
}
