/**
 * `POST`, `GET /keys` and `DELETE /keys/{id}`: API keys, for admins. Those of a tenant make, see and revoke its keys, and none
 * that may do more than themselves; operators those of any tenant.
 */
import type { IncomingMessage } from "node:http"
import * as NodeHttpServerRequest from "@effect/platform-node/NodeHttpServerRequest"
import { Effect } from "effect"
import { type HttpServerRequest, HttpServerResponse } from "effect/http"
import { HttpApiBuilder } from "effect/http-api"
import { Settings } from "../config.ts"
import { type ApiKeyRecord, KeyRequest, keyInfo } from "../protocol/ApiKey.ts"
import {
  type ApiError,
  AuthenticationUnavailable,
  Forbidden,
  InvalidInput,
  KeyNotFound,
  Overloaded
} from "../protocol/Errors.ts"
import { decoderOf } from "../protocol/Fields.ts"
import { RoutedApi } from "../protocol/HttpApi.ts"
import { isOperator, type Principal } from "../protocol/Principal.ts"
import { isKeyId, type NewKey } from "../tiers/ApiKeys.ts"
import { Access } from "./Access.ts"
import { ApiKeyring } from "./ApiKeyring.ts"
import * as Bodies from "./Bodies.ts"
import { callerOf } from "./Callers.ts"
import { problemResponse } from "./Problems.ts"

const decodeRequest = decoderOf(KeyRequest)

/** Handlers of the group `keys`. */
export const group = HttpApiBuilder.group(
  RoutedApi,
  "keys",
  Effect.fnUntraced(function* (handlers) {
    const keys = yield* ApiKeyring
    const access = yield* Access
    const settings = yield* Settings

    const adminOf = (request: HttpServerRequest.HttpServerRequest): Effect.Effect<Principal, ApiError> =>
      Effect.suspend(() => {
        const caller = callerOf(messageOf(request))
        const refusal = access.allow(caller, "admin")
        return refusal === undefined ? Effect.succeed(caller) : Effect.fail(refusal)
      })

    return handlers
      .handleRaw("createKey", ({ request }) =>
        Effect.gen(function* () {
          const caller = yield* adminOf(request)
          const body = yield* Bodies.json(request, settings)
          const wanted = yield* wantedBy(caller, yield* Effect.fromResult(decodeRequest(body)))
          const { record, key } = yield* Effect.mapError(keys.create(wanted), (error) =>
            error._tag === "TooManyKeys"
              ? new Overloaded({ bound: "apiKeysMax", retryAfterMillis: 60_000 })
              : unavailable(error)
          )
          yield* Effect.logInfo("A key was made", { key: record.id, tenant: record.tenant, by: caller.id })
          return json({ ...keyInfo(record), key }, 201)
        }).pipe(failed)
      )
      .handleRaw("listKeys", ({ request }) =>
        Effect.gen(function* () {
          const caller = yield* adminOf(request)
          const all = yield* Effect.mapError(keys.list, unavailable)
          return json({ keys: all.filter((record) => isFor(caller, record)).map(keyInfo) })
        }).pipe(failed)
      )
      .handleRaw("revokeKey", ({ params, request }) =>
        Effect.gen(function* () {
          const caller = yield* adminOf(request)
          const id = params.id.slice(0, 80)
          const revoked = isKeyId(id)
            ? yield* Effect.mapError(
                keys.revoke(id, (record) => isFor(caller, record)),
                unavailable
              )
            : undefined
          if (revoked === undefined) return yield* new KeyNotFound({ id })
          yield* Effect.logInfo("A key was revoked", { key: id, tenant: revoked.tenant, by: caller.id })
          return HttpServerResponse.empty({ status: 204, headers: noStore })
        }).pipe(failed)
      )
  })
)

/** Whether the caller has a say in the key. */
const isFor = (caller: Principal, record: ApiKeyRecord): boolean => {
  if (isOperator(caller)) return true
  if (record.tenant !== caller.tenant) return false
  const { collections } = caller
  if (collections === undefined) return true
  return record.collections?.every((name) => collections.has(name)) ?? false
}

/** The key that is asked for, if the caller may make it. */
const wantedBy = (caller: Principal, request: KeyRequest): Effect.Effect<NewKey, ApiError> => {
  const { name, tenant = caller.tenant, scopes = ["read"], tier = "standard", collections, expires_ms } = request
  const forbidden = (detail: string) => Effect.fail(new Forbidden({ scope: "", detail }))
  if (expires_ms !== undefined && expires_ms <= Date.now()) {
    return Effect.fail(new InvalidInput({ field: "expires_ms", expected: "a time to come", got: String(expires_ms) }))
  }
  if (!isOperator(caller)) {
    if (tenant !== caller.tenant) return forbidden("Keys of another tenant are made by operators.")
    if (scopes.some((scope) => !caller.scopes.has(scope)))
      return forbidden("The key would have scopes that you have not.")
    const isWithin = (allowed: ReadonlySet<string>) => collections?.every((one) => allowed.has(one)) ?? false
    if (caller.collections !== undefined && !isWithin(caller.collections)) {
      return forbidden("The key would be for collections that yours is not for.")
    }
    if (expires_ms === undefined ? caller.expiresAtMillis !== Infinity : expires_ms > caller.expiresAtMillis) {
      return forbidden("The key would outlive the credential it is made with.")
    }
  }
  return Effect.succeed({
    name,
    tenant,
    scopes,
    tier,
    ...(collections === undefined ? {} : { collections }),
    ...(expires_ms === undefined ? {} : { expires_ms })
  })
}

const unavailable = (_: unknown) =>
  new AuthenticationUnavailable({ detail: "The store of keys cannot be used now.", retryAfterMillis: 1_000 })

const noStore = { "cache-control": "no-store" }
const json = (value: unknown, status = 200) =>
  HttpServerResponse.text(JSON.stringify(value), { status, contentType: "application/json", headers: noStore })

const failed = Effect.catch((error: ApiError) => Effect.succeed(problemResponse(error)))

const messageOf = (request: HttpServerRequest.HttpServerRequest): IncomingMessage =>
  NodeHttpServerRequest.toIncomingMessage(request) as IncomingMessage
