/**
 * Collections belong to tenants. Inside, a collection of tenant `t` is named `t:name`, one of the tenant `default` is named
 * as its clients name it (and as all were before there were tenants). A client's name has no colon, so nobody can name what
 * is another's. The wires map names on the way in and, in answers and errors, on the way out.
 */
import {
  type ApiError,
  CollectionConflict,
  CollectionNotFound,
  PartitionCorrupt,
  PartitionUnavailable,
  VectorNotFound
} from "./Errors.ts"
import { defaultTenant } from "./Principal.ts"

/** The name inside of what a tenant's client calls `name`. */
export const storedName = (tenant: string, name: string): string =>
  tenant === defaultTenant ? name : `${tenant}:${name}`

/** The name as the tenant's clients know it. */
export const shownName = (stored: string): string => stored.slice(stored.indexOf(":") + 1)

export const tenantOf = (stored: string): string => {
  const at = stored.indexOf(":")
  return at === -1 ? defaultTenant : stored.slice(0, at)
}

/** Something with a collection's name, as the tenant's clients know it. */
export const shownCollection = <A extends { readonly name: string }>(of: A): A =>
  of.name.includes(":") ? { ...of, name: shownName(of.name) } : of

/** The same for an error. */
export const shownError = <E extends ApiError>(error: E): E => {
  if (!("collection" in error) || !error.collection.includes(":")) return error
  return named(error, shownName(error.collection)) as E
}

const named = (error: Extract<ApiError, { readonly collection: string }>, collection: string): ApiError => {
  switch (error._tag) {
    case "CollectionNotFound":
      return new CollectionNotFound(
        error.elsewhere === undefined ? { collection } : { collection, elsewhere: error.elsewhere }
      )
    case "VectorNotFound":
      return new VectorNotFound({ collection, id: error.id })
    case "CollectionConflict":
      return new CollectionConflict({ collection, field: error.field, expected: error.expected, got: error.got })
    case "PartitionUnavailable": {
      const { partition, detail, retryAfterMillis } = error
      return new PartitionUnavailable({ collection, partition, detail, retryAfterMillis })
    }
    case "PartitionCorrupt": {
      const { partition, object, detail } = error
      return new PartitionCorrupt({ collection, partition, object, detail })
    }
  }
}
