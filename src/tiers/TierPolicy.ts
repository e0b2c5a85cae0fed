/**
 * Which partitions deserve the full form: a pure decision. Memory is a knapsack, filled greedily by heat a byte; what is
 * full stays so unless what would displace it is hotter by a margin, so that partitions of about equal heat do not take
 * turns.
 *
 * Why it cannot thrash: an exchange happens only where the one promoted has at least `hysteresis` times the heat a byte of
 * each it displaces and the heat of all of them together. So while heats stand still each exchange raises the heat that is
 * served from full partitions, and there is a last one; while they waver by less than the margin nothing moves; and
 * whatever they do, a partition keeps its form for `residenceMillis` and at most `movesMax` moves are made at once.
 */
import type { Form, PartitionForm } from "./PartitionForms.ts"

export interface PolicyInput {
  readonly partitions: ReadonlyArray<PartitionForm>
  readonly budgetBytes: number
  readonly nowMillis: number
  /** When each took the form it has; one that is not in it may be moved. */
  readonly formSince: ReadonlyMap<string, number>
  /** Moves that may be made now. */
  readonly movesMax: number
  readonly residenceMillis: number
  /** At least 1. */
  readonly hysteresis: number
  /** Heat below which a partition is not promoted. */
  readonly heatMin: number
}

export type MoveReason =
  /** It fits. */
  | "hot"
  /** It takes the place of colder ones. */
  | "hotter"
  /** It makes place for a hotter one. */
  | "displaced"
  /** More is resident than the budget allows. */
  | "over_budget"

export interface Move {
  readonly partition: string
  readonly from: Form
  readonly to: Form
  readonly reason: MoveReason
  readonly heat: number
}

/** The mapped form's share of the full one's bytes, assumed of one that is not mapped yet; measured it is about 1/20. */
export const mappedShare = 1 / 8

/**
 * Moves, to be made in this order: after each of them the resident bytes are within the budget, if they were before. While
 * it is loaded, a promoted partition counts in both its forms.
 */
export const decide = (input: PolicyInput): ReadonlyArray<Move> => {
  const { partitions, budgetBytes, hysteresis } = input
  const moves: Array<Move> = []
  let used = partitions.reduce((sum, one) => sum + one.bytes, 0)

  // The least heat a byte first. What is busy is nobody's victim.
  const victims = partitions
    .filter((one) => one.form === "full" && !one.busy)
    .sort((a, b) => density(a) - density(b) || b.bytes - a.bytes)
  while (used > budgetBytes && moves.length < input.movesMax) {
    const victim = victims.shift()
    if (victim === undefined) break
    moves.push(demotion(victim, "over_budget"))
    used -= freed(victim)
  }

  const settled = victims.filter(
    ({ partition }) => input.nowMillis - (input.formSince.get(partition) ?? -Infinity) >= input.residenceMillis
  )
  const candidates = partitions
    .filter((one) => one.form === "mapped" && !one.busy && one.heat > 0 && one.heat >= input.heatMin)
    .sort((a, b) => density(b) - density(a))
  for (const candidate of candidates) {
    if (moves.length >= input.movesMax) break
    const displaced = displacedBy(candidate, settled, used + candidate.fullBytesEstimate - budgetBytes, hysteresis)
    if (displaced === undefined || moves.length + displaced.length + 1 > input.movesMax) continue
    for (const victim of displaced) {
      settled.splice(settled.indexOf(victim), 1)
      moves.push(demotion(victim, "displaced"))
      used -= freed(victim)
    }
    moves.push({
      partition: candidate.partition,
      from: "mapped",
      to: "full",
      reason: displaced.length === 0 ? "hot" : "hotter",
      heat: candidate.heat
    })
    used += candidate.fullBytesEstimate
  }
  return moves
}

/** Those to be demoted so that `needed` bytes come free; `undefined` where that is not worth it. */
const displacedBy = (
  candidate: PartitionForm,
  victims: ReadonlyArray<PartitionForm>,
  needed: number,
  hysteresis: number
): ReadonlyArray<PartitionForm> | undefined => {
  const displaced: Array<PartitionForm> = []
  let missing = needed
  let heat = 0
  for (const victim of victims) {
    if (missing <= 0) break
    if (density(candidate) < hysteresis * density(victim)) return undefined
    // A large one that as a whole is too hot: a smaller one may do.
    if (candidate.heat < hysteresis * (heat + victim.heat)) continue
    displaced.push(victim)
    heat += victim.heat
    missing -= freed(victim)
  }
  return missing <= 0 ? displaced : undefined
}

const density = (one: PartitionForm): number => one.heat / Math.max(1, one.fullBytesEstimate)

/** Bytes that a demotion surely frees. */
const freed = (one: PartitionForm): number => one.bytes * (1 - mappedShare)

const demotion = (one: PartitionForm, reason: MoveReason): Move => ({
  partition: one.partition,
  from: "full",
  to: "mapped",
  reason,
  heat: one.heat
})
