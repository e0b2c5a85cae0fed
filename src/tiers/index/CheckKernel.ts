/**
 * Loops over what a sketch file says, in WebAssembly: is it what a sketch can be? They run once when a partition is opened,
 * mostly the first time in the thread's life, when the same loops in JavaScript are not compiled yet and take twenty times
 * as long.
 */
import {
  add,
  advance,
  and,
  assemble,
  type Code,
  constant,
  define,
  type FunctionCode,
  get,
  greaterOrEqual,
  i32,
  isZero,
  Kernel,
  lessThan,
  loadInt,
  type Memory,
  or,
  set,
  shiftLeft,
  shiftRight,
  storeInt,
  subtract,
  tee,
  until,
  when
} from "./Assembler.ts"

/** All are counts of what is wrong, but for `distinct`. Addresses are multiples of four, and not 0. */
export interface CheckKernel {
  /** Float32s that are infinite or not a number. */
  readonly endless: (from: number, end: number) => number
  /** Unsigned int32s that are not below a limit. */
  readonly beyond: (from: number, end: number, limit: number) => number
  /** Unsigned int32s that are below the one before. */
  readonly falling: (from: number, end: number) => number
  /** The same of those that are not above it, but for the first of each group; `groupMask` is the size of a group, a power of two, less one. */
  readonly stalling: (from: number, end: number, groupMask: number) => number
  /** How many different numbers below a limit there are; `bits` is room for a bit of each, all zero. */
  readonly distinct: (from: number, end: number, limit: number, bits: number) => number
}

/** The loops over one memory. */
export const checkKernelOf = (memory: Memory): CheckKernel => kernel.on(memory)

const kernel = new Kernel<CheckKernel>(() =>
  assemble([
    counting("endless", ({ at }) => [
      ...get(at),
      ...loadInt,
      ...constant(exponentBits),
      ...and,
      ...constant(exponentBits),
      ...greaterOrEqual
    ]),
    counting("beyond", ({ at, parameter }) => [...get(at), ...loadInt, ...get(parameter), ...greaterOrEqual]),
    counting("falling", ({ at, from }) => [
      ...get(from),
      ...get(at),
      ...lessThan,
      ...get(at),
      ...loadInt,
      ...before(at),
      ...lessThan,
      ...and
    ]),
    counting("stalling", ({ at, from, parameter }) => [
      ...get(at),
      ...get(from),
      ...subtract,
      ...constant(2),
      ...shiftRight,
      ...get(parameter),
      ...and,
      ...isZero,
      ...isZero,
      ...before(at),
      ...get(at),
      ...loadInt,
      ...greaterOrEqual,
      ...and
    ]),
    distinct()
  ])
)

/** Of a float32, all set where it is infinite or not a number. */
const exponentBits = 0x7f800000

/** The int32 before an address. */
const before = (at: number): Code => [...get(at), ...constant(4), ...subtract, ...loadInt]

interface Counting {
  readonly from: number
  readonly at: number
  readonly parameter: number
}

/** Counts the words of which a condition holds. */
const counting = (name: string, condition: (local: Counting) => Code): FunctionCode =>
  define(name, { from: i32, end: i32, parameter: i32 }, i32, { at: i32, found: i32 }, (local) => {
    const { from, end, at, found } = local
    return [
      ...get(from),
      ...set(at),
      ...until(
        [...get(at), ...get(end), ...greaterOrEqual],
        [...get(found), ...condition(local), ...add, ...set(found), ...advance(at, 4)]
      ),
      ...get(found)
    ]
  })

const distinct = (): FunctionCode =>
  define(
    "distinct",
    { from: i32, end: i32, limit: i32, bits: i32 },
    i32,
    { value: i32, word: i32, bit: i32, found: i32 },
    ({ from, end, limit, bits, value, word, bit, found }) => [
      ...until(
        [...get(from), ...get(end), ...greaterOrEqual],
        [
          ...when(
            [...get(from), ...loadInt, ...tee(value), ...get(limit), ...lessThan],
            [
              ...get(bits),
              ...get(value),
              ...constant(5),
              ...shiftRight,
              ...constant(2),
              ...shiftLeft,
              ...add,
              ...set(word),
              // A shift takes the lower five bits of what it shifts by.
              ...constant(1),
              ...get(value),
              ...shiftLeft,
              ...set(bit),
              ...when(
                [...get(word), ...loadInt, ...get(bit), ...and, ...isZero],
                [...advance(found, 1), ...get(word), ...get(word), ...loadInt, ...get(bit), ...or, ...storeInt(0)]
              )
            ]
          ),
          ...advance(from, 4)
        ]
      ),
      ...get(found)
    ]
  )
