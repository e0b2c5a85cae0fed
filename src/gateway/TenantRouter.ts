/**
 * The `Router` as one caller may use it: asks whether the caller may, takes the names of its tenant's collections, and gives
 * errors in which they are named so. The one place in which clients' names become those inside and back.
 *
 * `Collection`s are given as the `Router` has them, because it is asked with them again; on their way out they pass
 * `shownCollection`.
 */
import { Context, Effect, Layer } from "effect"
import type { Collection } from "../protocol/Collection.ts"
import { type ApiError, Forbidden } from "../protocol/Errors.ts"
import { defaultTenant, type Principal, type Scope } from "../protocol/Principal.ts"
import type { SessionQuery } from "../protocol/StreamSession.ts"
import { shownError, shownName, storedName, tenantOf } from "../protocol/Tenant.ts"
import { requestIdOf } from "../shards/RequestIds.ts"
import { Router } from "../shards/Router.ts"
import { Access } from "./Access.ts"

type Routes = Router["Service"]

/** Writes take the client's key of the request, if it gave one, in place of the `Router`'s id. */
export interface TenantView
  extends Pick<
    Routes,
    "count" | "revision" | "upsert" | "get" | "updateMetadata" | "remove" | "search" | "searchByUrl"
  > {
  readonly createCollection: (
    ...request: Parameters<Routes["createCollection"]>
  ) => Effect.Effect<Effect.Success<ReturnType<Routes["createCollection"]>>, ApiError>
  readonly collection: (name: string) => Effect.Effect<Collection, ApiError>
  /** The tenant's own, of those that the credential is for. */
  readonly collections: Effect.Effect<ReadonlyArray<Collection>, ApiError>
  readonly deleteCollection: (name: string) => Effect.Effect<void, ApiError>
  readonly invalidate: (
    ...request: Parameters<Routes["invalidate"]>
  ) => Effect.Effect<Effect.Success<ReturnType<Routes["invalidate"]>>, ApiError>
}

export class TenantRouter extends Context.Service<TenantRouter, { readonly of: (caller: Principal) => TenantView }>()(
  "ruvector/gateway/TenantRouter"
) {
  static readonly layer = Layer.effect(
    TenantRouter,
    Effect.gen(function* () {
      const router = yield* Router
      const access = yield* Access
      const views = new WeakMap<Principal, TenantView>()
      return TenantRouter.of({
        of: (caller) => {
          const found = views.get(caller)
          if (found !== undefined) return found
          const view = viewOf(router, access, caller)
          views.set(caller, view)
          return view
        }
      })
    })
  )
}

/** A query with the collection's name inside. */
export const storedQuery = (caller: Principal, query: SessionQuery): SessionQuery =>
  caller.tenant === defaultTenant ? query : { ...query, collection: storedName(caller.tenant, query.collection) }

const viewOf = (router: Routes, access: Access["Service"], caller: Principal): TenantView => {
  const { tenant } = caller
  const isDefault = tenant === defaultTenant

  const shown = <A>(effect: Effect.Effect<A, ApiError>): Effect.Effect<A, ApiError> =>
    isDefault ? effect : Effect.mapError(effect, shownError)

  /** What is done with a collection of that name, if it may be. */
  const within = <A>(scope: Scope, name: string, use: (stored: string) => Effect.Effect<A, ApiError>) =>
    Effect.suspend((): Effect.Effect<A, ApiError> => {
      const refusal = access.allow(caller, scope, name)
      return refusal === undefined ? shown(use(storedName(tenant, name))) : Effect.fail(refusal)
    })

  const isVisible = (of: Collection): boolean =>
    tenantOf(of.name) === tenant && (caller.collections === undefined || caller.collections.has(shownName(of.name)))

  /** What of a client's key is known inside; another caller's same key is another. */
  const requestIdFor = (key: string | undefined): string | undefined =>
    key === undefined ? undefined : requestIdOf(`${tenant}/${caller.id}`, key)

  return {
    createCollection: (name, request) =>
      Effect.suspend((): ReturnType<TenantView["createCollection"]> => {
        const refusal = access.allow(caller, "write")
        if (refusal !== undefined) return Effect.fail(refusal)
        // The same whether there is one of that name or not.
        if (caller.collections !== undefined && !caller.collections.has(name)) return Effect.fail(otherCollections)
        return shown(router.createCollection(storedName(tenant, name), request))
      }),
    collection: (name) => within("read", name, router.collection),
    collections: Effect.suspend((): Effect.Effect<ReadonlyArray<Collection>, ApiError> => {
      const refusal = access.allow(caller, "read")
      return refusal === undefined
        ? Effect.map(router.collections, (all) => all.filter(isVisible))
        : Effect.fail(refusal)
    }),
    deleteCollection: (name) => within("admin", name, router.deleteCollection),
    count: (of) => shown(router.count(of)),
    revision: router.revision,
    upsert: (name, records, ack, key) =>
      within("write", name, (stored) => router.upsert(stored, records, ack, requestIdFor(key))),
    get: (name, id) => within("read", name, (stored) => router.get(stored, id)),
    updateMetadata: (name, id, patch, key) =>
      within("write", name, (stored) => router.updateMetadata(stored, id, patch, requestIdFor(key))),
    remove: (name, ids, key) => within("write", name, (stored) => router.remove(stored, ids, requestIdFor(key))),
    search: (query) => within("read", query.collection, () => router.search(storedQuery(caller, query))),
    searchByUrl: (query) => within("read", query.collection, () => router.searchByUrl(storedQuery(caller, query))),
    invalidate: (name, request) =>
      within("write", name, (stored) =>
        Effect.map(router.invalidate(stored, request), (done) => ({ ...done, collection: name }))
      )
  }
}

const otherCollections = new Forbidden({ scope: "", detail: "The credential is for other collections." })
