/** The command line: `serve`, and the commands of `commands/`. What is below knows nothing of it. */
import { readFileSync } from "node:fs"
import { resolve } from "node:path"
import * as NodeRuntime from "@effect/platform-node/NodeRuntime"
import * as NodeServices from "@effect/platform-node/NodeServices"
import { Cause, Console, Effect, Exit, Layer, Logger, Option, References, Runtime } from "effect"
import { Command, Flag } from "effect/cli"
import { backup } from "./commands/backup.ts"
import { cluster } from "./commands/cluster.ts"
import { drill } from "./commands/drill.ts"
import { keys } from "./commands/keys.ts"
import { migrate } from "./commands/migrate.ts"
import { Refused } from "./commands/Refused.ts"
import { restore } from "./commands/restore.ts"
import { endWithSupervisor } from "./commands/Supervised.ts"
import { verify } from "./commands/verify.ts"
import { flagOf, readSettings, type SettingName, type SettingValues, settings, variableOf } from "./config.ts"
import { isLoopback } from "./gateway/Access.ts"
import { HttpGateway } from "./gateway/HttpGateway.ts"
import { activate, localDirectory, node } from "./server.ts"

const { version } = JSON.parse(readFileSync(new URL("../package.json", import.meta.url), "utf8")) as { version: string }

const flags = Object.fromEntries(
  (Object.keys(settings) as Array<SettingName>).map((name) => {
    const { description, unit, default: value, bound } = settings[name]
    const what = unit === "" ? description : `${description} [${unit}]`
    return [
      name,
      Flag.String(flagOf(name)).pipe(
        Flag.withDescription(`${what} (default ${value}; ${bound}; ${variableOf(name)})`),
        Flag.optional
      )
    ]
  })
) as Record<SettingName, Flag.Flag<Option.Option<string>>>

const serve = Command.make("serve", flags, (given) =>
  Effect.gen(function* () {
    const named = Object.fromEntries(
      Object.entries(given).flatMap(([name, value]) => (Option.isSome(value) ? [[name, value.value]] : []))
    )
    const values = yield* Effect.try({
      try: () => readSettings(named, process.env),
      catch: (error) => new Refused({ message: (error as Error).message })
    })
    endsWithin(values.stopMillis)
    yield* Effect.provide(run(values), logging(values))
  })
).pipe(Command.withDescription("Serve collections, searches and streams from a data directory"))

/**
 * Once told to stop the process ends in time, whatever hangs: what was acknowledged is safe, and who has told it would only end
 * it by force.
 */
const endsWithin = (stopMillis: number): void => {
  const began = () => {
    setTimeout(() => {
      process.stderr.write(`ruvector: not stopped after ${stopMillis} ms: ended as it is\n`)
      process.exit(1)
    }, stopMillis).unref()
  }
  process.once("SIGTERM", began)
  process.once("SIGINT", began)
}

/** Opens everything, says where, and serves until it is told to stop. */
const run = (values: SettingValues) =>
  Effect.scoped(
    Effect.gen(function* () {
      endWithSupervisor()
      const context = yield* Layer.build(node(values)).pipe(
        Effect.catch((error) => Effect.fail(new Refused({ message: error.message })))
      )
      const { host, port } = yield* Effect.provideContext(HttpGateway, context)
      yield* Console.log(greeting(host, port, values))
      yield* Effect.provideContext(activate, context)
      return yield* Effect.never
    })
  )

const greeting = (host: string, port: number, values: SettingValues): string => {
  const shown = host.includes(":") ? `[${host}]` : host
  const base = `${values.tlsCert === "" ? "http" : "https"}://${shown}:${port}`
  return [
    `ruvector-streaming ${version} listens on ${base}, ${place(values)}`,
    ...openness(values),
    "First vectors and a first search:",
    `  curl --json '{"vectors":[{"id":"a","vector":[1,0,0]},{"id":"b","vector":[0.8,0.6,0]}]}' ${base}/api/v1/insert`,
    `  curl -N '${base}/api/v1/stream/search?query_vector_id=a&k=2'`,
    `Try it in a browser: ${base}/docs`
  ].join("\n")
}

/** Whether anybody may do anything, which nobody is to find out from a log alone. */
const openness = ({ anonymousAccess, host }: SettingValues): ReadonlyArray<string> => {
  if (anonymousAccess === "everyone")
    return ["Everybody who reaches it may do everything (--anonymous-access everyone)."]
  return anonymousAccess === "loopback" && isLoopback(host)
    ? ["Whoever is on this machine may do everything, without a credential (--anonymous-access off ends that)."]
    : []
}

const place = (values: SettingValues): string => {
  const local = resolve(localDirectory(values))
  return localDirectory(values) === values.data ? `data in ${local}` : `data in ${values.data}, cache in ${local}`
}

const levels = { trace: "Trace", debug: "Debug", info: "Info", warn: "Warn", error: "Error" } as const

const logging = (values: Pick<SettingValues, "logFormat" | "logLevel">) => {
  const forPeople = values.logFormat === "pretty" || (values.logFormat === "auto" && process.stderr.isTTY === true)
  // Lines go to stderr: stdout is for what a command answers.
  const toStderr = (logger: Logger.Logger<unknown, string>) =>
    Logger.make<unknown, void>((options) => {
      process.stderr.write(`${logger.log(options)}\n`)
    })
  return Layer.mergeAll(
    Logger.layer([toStderr(forPeople ? Logger.formatLogFmt : Logger.formatJson)]),
    Layer.succeed(References.MinimumLogLevel, levels[values.logLevel as keyof typeof levels])
  )
}

/** Of commands that end by themselves: what is wrong, and no more. */
const quietly = logging({ logFormat: "auto", logLevel: "warn" })

const root = Command.make("ruvector").pipe(
  Command.withDescription("A vector database whose unit is the stream"),
  Command.withSubcommands([
    serve,
    Command.provide(cluster, quietly),
    Command.provide(backup, quietly),
    Command.provide(restore, quietly),
    Command.provide(verify, quietly),
    Command.provide(drill, quietly),
    Command.provide(keys, quietly),
    Command.provide(migrate, quietly)
  ])
)

const program = Command.run(root, { version }).pipe(
  Effect.catchIf(
    (error): error is Refused => error instanceof Refused,
    (error) =>
      Effect.sync(() => {
        process.stderr.write(`ruvector: ${error.message}\n`)
        process.exitCode = 1
      })
  ),
  Effect.provide(NodeServices.layer)
)

NodeRuntime.runMain(program, {
  teardown: (exit, onExit) => {
    // Told to stop (SIGTERM, Ctrl-C) is a clean end; a refusal has set its code already.
    if (Exit.isSuccess(exit) || Cause.hasInterruptsOnly(exit.cause)) return onExit(Number(process.exitCode ?? 0))
    Runtime.defaultTeardown(exit, onExit)
  }
})
