/**
 * `keys create | list | revoke`: API keys in a data directory or a bucket, also while nodes use it: keys are objects of their
 * own, and every change of one is a conditional write.
 */
import { existsSync } from "node:fs"
import { join } from "node:path"
import { Console, Context, Effect, Layer, Option, Result, type Scope } from "effect"
import { Argument, Command, Flag } from "effect/cli"
import { defaultSettings } from "../config.ts"
import { type ApiKeyRecord, KeyRequest, keyInfo } from "../protocol/ApiKey.ts"
import { decoderOf } from "../protocol/Fields.ts"
import { defaultTenant } from "../protocol/Principal.ts"
import * as ApiKeys from "../tiers/ApiKeys.ts"
import { scratchDirectory, shownPlace } from "../tiers/BackupStore.ts"
import * as Bucket from "../tiers/Bucket.ts"
import { isBucketUrl } from "../tiers/Bucket.ts"
import * as DataDirectory from "../tiers/DataDirectory.ts"
import * as FileObjectStore from "../tiers/FileObjectStore.ts"
import { ObjectStore } from "../tiers/ObjectStore.ts"
import { Refused, refusing } from "./Refused.ts"

const data = Flag.String("data").pipe(
  Flag.withDescription("data directory, or gs://bucket/prefix"),
  Flag.withDefault("./data")
)

const decodeRequest = decoderOf(KeyRequest)

const create = Command.make(
  "create",
  {
    data,
    name: Flag.String("name").pipe(Flag.withDescription("what the key is for")),
    tenant: Flag.String("tenant").pipe(
      Flag.withDescription("whose collections it is for"),
      Flag.withDefault(defaultTenant)
    ),
    scopes: Flag.String("scopes").pipe(
      Flag.withDescription("some of read, write and admin, by commas"),
      Flag.withDefault("read")
    ),
    tier: Flag.String("tier").pipe(
      Flag.withDescription("premium or standard: standard is shed first under overload"),
      Flag.withDefault("standard")
    ),
    collections: Flag.String("collections").pipe(
      Flag.withDescription("the only collections it is for, by commas"),
      Flag.optional
    ),
    days: Flag.Int("expires-days").pipe(Flag.withDescription("days after which it ends"), Flag.optional)
  },
  ({ data, name, tenant, scopes, tier, collections, days }) =>
    Effect.gen(function* () {
      const given = Option.getOrUndefined(days)
      if (given !== undefined && !(given >= 1 && given <= 36_500)) {
        return yield* new Refused({ message: `--expires-days: expected 1 to 36500, got ${given}` })
      }
      const request = decodeRequest({
        name,
        tenant,
        scopes: scopes.split(","),
        tier,
        ...(Option.isSome(collections) ? { collections: collections.value.split(",") } : {}),
        ...(given === undefined ? {} : { expires_ms: Date.now() + given * 86_400_000 })
      })
      if (Result.isFailure(request)) {
        const { field, expected, got } = request.failure
        return yield* new Refused({ message: `--${field.replace(/\[.*/, "")}: expected ${expected}, got ${got}` })
      }
      const wanted = { tenant, tier: "standard", scopes: ["read"], ...request.success } as ApiKeys.NewKey
      const { record, key } = yield* ApiKeys.createKey(yield* openForKeys(data, "make"), wanted)
      yield* Console.log(key)
      process.stderr.write(
        `Key ${record.id} for tenant ${record.tenant}: ${record.scopes.join(", ")}. It is shown this once.\n`
      )
    }).pipe(Effect.scoped, refusing)
).pipe(Command.withDescription("Make a key, and write it to standard output"))

const list = Command.make(
  "list",
  {
    data,
    json: Flag.Boolean("json").pipe(Flag.withDescription("one JSON object a line"), Flag.withDefault(false))
  },
  ({ data, json }) =>
    Effect.gen(function* () {
      const found = yield* ApiKeys.listKeys(yield* openForKeys(data, "find"))
      if (json) {
        for (const record of found) yield* Console.log(JSON.stringify(keyInfo(record)))
        return
      }
      if (found.length === 0) return yield* Console.log("There are no keys.")
      yield* Console.log(table(found))
    }).pipe(Effect.scoped, refusing)
).pipe(Command.withDescription("List the keys there are, and were"))

const revoke = Command.make(
  "revoke",
  { data, id: Argument.String("id").pipe(Argument.withDescription("the key's id, as listed; not the key itself")) },
  ({ data, id }) =>
    Effect.gen(function* () {
      const store = yield* openForKeys(data, "find")
      // Whoever pastes the whole key means that one.
      const named = ApiKeys.parseKey(id)?.id ?? id
      const revoked = ApiKeys.isKeyId(named) ? yield* ApiKeys.revokeKey(store, named) : undefined
      if (revoked === undefined) return yield* new Refused({ message: `there is no key ${named.slice(0, 80)}` })
      yield* Console.log(
        `Key ${named} is revoked. Nodes that use it notice within their keyRefreshMillis (${defaultSettings.keyRefreshMillis} ms by default).`
      )
    }).pipe(Effect.scoped, refusing)
).pipe(Command.withDescription("End a key for good"))

export const keys = Command.make("keys").pipe(
  Command.withDescription("Make, list and revoke API keys, also while nodes use the data"),
  Command.withSubcommands([create, list, revoke])
)

/** The store of the keys; a directory is made where a first key is. */
const openForKeys = (
  place: string,
  purpose: "find" | "make"
): Effect.Effect<ObjectStore["Service"], Refused, Scope.Scope> =>
  refusing(
    Effect.gen(function* () {
      if (isBucketUrl(place)) {
        const scratch = yield* scratchDirectory
        return Context.get(yield* Layer.build(Bucket.layer(place, scratch, defaultSettings)), ObjectStore)
      }
      if (purpose === "find" && !existsSync(join(place, "FORMAT"))) {
        return yield* new Refused({ message: `there is no data directory ${shownPlace(place)}` })
      }
      const cell = yield* Effect.promise(() => DataDirectory.cellOf(place))
      const objects = yield* DataDirectory.open({
        path: place,
        ...(cell === undefined ? {} : { sharedBy: cell })
      }).pipe(
        Effect.map((directory) => directory.objects),
        // A node uses it: objects may be changed by several processes at once.
        Effect.catchTag("DataDirectoryLocked", () => Effect.succeed(join(place, "objects")))
      )
      return Context.get(yield* Layer.build(FileObjectStore.layer({ directory: objects })), ObjectStore)
    })
  )

const table = (records: ReadonlyArray<ApiKeyRecord>): string => {
  const rows = [
    ["id", "tenant", "scopes", "tier", "state", "made", "last used", "name"],
    ...records.map((record) => [
      record.id,
      record.tenant,
      record.scopes.join(","),
      record.tier,
      stateOf(record),
      day(record.created_ms),
      record.last_used_ms === undefined ? "-" : day(record.last_used_ms),
      record.name + (record.collections === undefined ? "" : ` (only ${record.collections.join(", ")})`)
    ])
  ]
  const widths = (rows[0] as Array<string>).map((_, column) =>
    Math.max(...rows.map((row) => (row[column] as string).length))
  )
  return rows
    .map((row) =>
      row
        .map((cell, column) => cell.padEnd(widths[column] as number))
        .join("  ")
        .trimEnd()
    )
    .join("\n")
}

const stateOf = ({ revoked_ms, expires_ms }: ApiKeyRecord): string => {
  if (revoked_ms !== undefined) return `revoked ${day(revoked_ms)}`
  if (expires_ms === undefined) return "good"
  return expires_ms <= Date.now() ? `expired ${day(expires_ms)}` : `until ${day(expires_ms)}`
}

const day = (millis: number): string => new Date(millis).toISOString().slice(0, 10)
