/** `cluster`: gateways and runners on this machine, for trying what a cluster does. */
import { mkdir } from "node:fs/promises"
import { join, resolve } from "node:path"
import { Console, Effect, Option } from "effect"
import { Command, Flag } from "effect/cli"
import { flagOf, readSettings, settings, variableOf } from "../config.ts"
import * as DataDirectory from "../tiers/DataDirectory.ts"
import * as DirectoryLock from "../tiers/DirectoryLock.ts"
import { LocalCluster, type Started } from "./LocalCluster.ts"
import { Refused, refusing } from "./Refused.ts"

export const cluster = Command.make(
  "cluster",
  {
    gateways: Flag.Int("gateways").pipe(Flag.withDescription("gateways, 1 to 16"), Flag.withDefault(2)),
    runners: Flag.Int("runners").pipe(Flag.withDescription("runners, 1 to 64"), Flag.withDefault(3)),
    data: Flag.String("data").pipe(
      Flag.withDescription("directory that all of them share; Postgres and Redis are below it"),
      Flag.withDefault("./cluster-data")
    ),
    port: Flag.Int("port").pipe(
      Flag.withDescription("of the first gateway, the others have the next ones; 0: free ones"),
      Flag.withDefault(settings.port.default)
    ),
    databaseUrl: Flag.String(flagOf("databaseUrl")).pipe(
      Flag.withDescription(`a Postgres that is there; without it one is started (${variableOf("databaseUrl")})`),
      Flag.optional
    ),
    redisUrl: Flag.String(flagOf("redisUrl")).pipe(
      Flag.withDescription(`a Redis that is there; without it one is started if installed (${variableOf("redisUrl")})`),
      Flag.optional
    )
  },
  (given) =>
    Effect.gen(function* () {
      const { gateways, runners, port } = given
      const bounds = [
        ["gateways", gateways, 1, 16],
        ["runners", runners, 1, 64],
        ["port", port, 0, 65_535 - gateways]
      ] as const
      for (const [name, value, least, most] of bounds) {
        if (value >= least && value <= most) continue
        return yield* new Refused({ message: `--${name}: expected ${least} to ${most}, got ${value}` })
      }
      // The environment is the nodes'; what is named here is put there for them.
      for (const name of ["databaseUrl", "redisUrl"] as const) {
        if (Option.isSome(given[name])) process.env[variableOf(name)] = given[name].value
      }
      const values = yield* Effect.try({
        try: () => readSettings({ role: "all" }, process.env),
        catch: (error) => new Refused({ message: (error as Error).message })
      })
      const data = resolve(given.data)
      // Marked as the cell's, which also refuses a directory that is another's.
      yield* Effect.scoped(DataDirectory.open({ path: data, sharedBy: values.cell }))
      const services = join(data, "services")
      yield* Effect.promise(() => mkdir(services, { recursive: true, mode: 0o711 }))
      yield* DirectoryLock.acquire(services).pipe(
        Effect.mapError((error) =>
          error._tag === "LockHeld"
            ? new Refused({ message: `a cluster runs on ${data} already (process ${error.pid})` })
            : new Refused({ message: `${services} cannot be used: ${error.detail}` })
        )
      )
      const running = yield* Effect.acquireRelease(
        Effect.sync(() => new LocalCluster({ gateways, runners, port, settings: values, data, onLine: printLine })),
        (running) =>
          Effect.promise(async () => {
            // Asked a second time while it ends.
            const now = () => running.kill()
            process.on("SIGINT", now).on("SIGTERM", now)
            await running.stop()
            process.off("SIGINT", now).off("SIGTERM", now)
          })
      )
      const started = yield* Effect.tryPromise({ try: () => running.start(), catch: (error) => error as Error })
      yield* Console.log(greeting(started, runners, data))
      return yield* Effect.never
    }).pipe(Effect.scoped, refusing)
).pipe(
  Command.withDescription(
    "Run gateways and runners on this machine over one data directory, with a Postgres and a Redis of their own"
  )
)

const greeting = ({ gateways, processes, postgres, redis }: Started, runners: number, data: string): string => {
  const [first = ""] = gateways
  const last = gateways.at(-1) ?? first
  return [
    `${gateways.length} gateway(s) and ${runners} runner(s) serve, data in ${data}`,
    `  Postgres: ${postgres}; Redis: ${redis ?? "none (apt-get install redis-server, or --redis-url), so caches are each node's own"}`,
    ...gateways.map((base, i) => `  gateway-${i + 1}: ${base}`),
    `  processes: ${processes.map(({ name, pid }) => `${name} ${pid}`).join(", ")}`,
    "First vectors by one gateway, and a first search by another:",
    `  curl --json '{"vectors":[{"id":"a","vector":[1,0,0]},{"id":"b","vector":[0.8,0.6,0]}]}' ${first}/api/v1/insert`,
    `  curl -N '${last}/api/v1/stream/search?query_vector_id=a&k=2'`,
    `Its nodes: curl ${first}/api/v1/cluster`,
    "Ctrl-C ends all of it; a node that is killed is started again."
  ].join("\n")
}

const isColoured = process.stderr.isTTY === true && process.env["NO_COLOR"] === undefined
const colours = { gateway: 36, runner: 32, postgres: 35, redis: 33 } as const

/** `runner-2   | line` */
const printLine = (name: string, line: string, note: boolean): void => {
  const prefix = `${name.padEnd(10)} |`
  const colour = colours[name.replace(/-\d+$/, "") as keyof typeof colours]
  const shown = isColoured ? `\u001b[${colour}m${prefix}\u001b[0m` : prefix
  process.stderr.write(`${shown} ${note ? "cluster: " : ""}${line}\n`)
}
