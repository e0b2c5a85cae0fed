/**
 * Events of subscriptions, made once for all who are sent the same: as data, for wires that encode it themselves, and as
 * JSON, for those that send text.
 */
import type { Message } from "../protocol/AgentChannel.ts"
import type { Change } from "../protocol/IndexPartition.ts"
import type { StandingMember } from "../shards/StandingQueries.ts"
import type { AnswerDifference } from "./AnswerChanges.ts"

export type StreamEvent = { readonly cursor: string } & (
  | { readonly event: "subscribed"; readonly members: ReadonlyArray<StandingMember>; readonly open: string }
  | {
      readonly event: "resumed"
      readonly keep: ReadonlyArray<string> | undefined
      readonly difference: AnswerDifference
      readonly open: string
    }
  | { readonly event: "changes"; readonly difference: AnswerDifference; readonly open: string }
  | { readonly event: "following" | "resync"; readonly open: string }
  | { readonly event: "change"; readonly change: Change; readonly open: string }
  | { readonly event: "listening" | "gap"; readonly open: string }
  | { readonly event: "message"; readonly message: Message; readonly open: string }
)

// An event's `open` is its JSON text without its cursor and the closing brace: a wire adds those, and members of its own.

export const subscribed = (members: ReadonlyArray<StandingMember>, cursor: string): StreamEvent => {
  let results = ""
  for (const member of members) results += results === "" ? `{${memberText(member)}}` : `,{${memberText(member)}}`
  return { event: "subscribed", members, cursor, open: `{"event":"subscribed","results":[${results}]` }
}

export const resumed = (
  keep: ReadonlyArray<string> | undefined,
  difference: AnswerDifference,
  cursor: string
): StreamEvent => {
  const kept = keep === undefined ? "" : `,"keep":${JSON.stringify(keep)}`
  const open = `{"event":"resumed"${kept},"changes":[${differenceText(difference)}]`
  return { event: "resumed", keep, difference, cursor, open }
}

export const changes = (difference: AnswerDifference, cursor: string): StreamEvent => ({
  event: "changes",
  difference,
  cursor,
  open: `{"event":"changes","changes":[${differenceText(difference)}]`
})

export const feed = (event: "following" | "resync", cursor: string): StreamEvent => ({
  event,
  cursor,
  open: `{"event":"${event}"`
})

export const change = (of: Change, cursor: string): StreamEvent => {
  const { kind, id, version } = of
  const open = `{"event":"change","kind":"${kind}","vector_id":${JSON.stringify(id)},"version":"${version}"`
  return { event: "change", change: of, cursor, open }
}

export const heard = (event: "listening" | "gap", cursor: string): StreamEvent => ({
  event,
  cursor,
  open: `{"event":"${event}"`
})

export const message = (of: Message, cursor: string): StreamEvent => {
  const { atMillis, body, id, key } = of
  const named = `"key":${JSON.stringify(key)},"message_id":${JSON.stringify(id)}`
  return {
    event: "message",
    message: of,
    cursor,
    open: `{"event":"message",${named},"message":${body},"at_ms":${Math.trunc(atMillis)}`
  }
}

const differenceText = ({ leaves, enters, updates }: AnswerDifference): string => {
  let text = ""
  for (const id of leaves) text += `${text === "" ? "" : ","}{"type":"leave","vector_id":${JSON.stringify(id)}}`
  for (const member of enters) text += `${text === "" ? "" : ","}{"type":"enter",${memberText(member)}}`
  for (const member of updates) text += `${text === "" ? "" : ","}{"type":"update",${memberText(member)}}`
  return text
}

const memberText = ({ id, score, version, metadata, vector }: StandingMember): string => {
  let text = `"vector_id":${JSON.stringify(id)},"score":${score},"version":"${version}"`
  if (metadata !== undefined) text += `,"metadata":${metadata || "{}"}`
  if (vector !== undefined) text += `,"vector":[${vector.join(",")}]`
  return text
}
