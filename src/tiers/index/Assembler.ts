/**
 * Assembles WebAssembly modules whose functions work on one imported memory, instruction by instruction: each instruction
 * is a short list of bytes, a function body is their concatenation in the order of the stack machine. Encodings are those
 * of the WebAssembly core specification 3.0, with its vector and relaxed vector instructions.
 */

export type Code = ReadonlyArray<number>

export const i32 = 0x7f
export const f32 = 0x7d
export const v128 = 0x7b
export type ValueType = typeof i32 | typeof f32 | typeof v128

/** A function under its exported name: parameters, then locals, are numbered from 0 in the order they are listed in. */
export interface FunctionCode {
  readonly name: string
  readonly parameters: ReadonlyArray<ValueType>
  readonly result: ValueType | undefined
  readonly locals: ReadonlyArray<ValueType>
  readonly body: Code
}

/** A function whose parameters and locals are named. */
export const define = <const Parameters extends string, const Locals extends string>(
  name: string,
  parameters: { readonly [Name in Parameters]: ValueType },
  result: ValueType | undefined,
  locals: { readonly [Name in Locals]: ValueType },
  body: (local: { readonly [Name in Parameters | Locals]: number }) => Code
): FunctionCode => {
  const names = [...Object.keys(parameters), ...Object.keys(locals)]
  const numbers = Object.fromEntries(names.map((one, i) => [one, i])) as Record<Parameters | Locals, number>
  return {
    name,
    parameters: Object.values<ValueType>(parameters),
    result,
    locals: Object.values<ValueType>(locals),
    body: body(numbers)
  }
}

/** The bytes of a module that imports the memory `of.memory` and exports the functions. */
export const assemble = (functions: ReadonlyArray<FunctionCode>): Uint8Array<ArrayBuffer> => {
  const sized = (bytes: Code): Code => [...unsigned(bytes.length), ...bytes]
  const counted = (items: ReadonlyArray<Code>): Code => [...unsigned(items.length), ...items.flat()]
  const name = (text: string): Code => sized([...Buffer.from(text)])
  const section = (id: number, bytes: Code): Code => [id, ...sized(bytes)]
  return Uint8Array.from([
    ...[0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0],
    ...section(
      1,
      counted(
        functions.map(({ parameters, result }) => [
          0x60,
          ...counted(parameters.map((type) => [type])),
          ...(result === undefined ? [0] : [1, result])
        ])
      )
    ),
    ...section(2, [1, ...name("of"), ...name("memory"), 2, 0, 0]),
    ...section(3, counted(functions.map((_, i) => unsigned(i)))),
    ...section(7, counted(functions.map((one, i) => [...name(one.name), 0, ...unsigned(i)]))),
    ...section(
      10,
      counted(functions.map(({ locals, body }) => sized([...counted(locals.map((type) => [1, type])), ...body, 0x0b])))
    )
  ])
}

/** A memory that grows by pages of 64 KiB; its buffer is another one afterwards. */
export interface Memory {
  readonly buffer: ArrayBuffer
  grow(pages: number): number
}

export const pageBytes = 65_536

export const memoryOf = (pages: number): Memory => new WebAssembly.Memory({ initial: pages })

/** A module compiled when it is first used; its functions then work on any memory. The caller says what they are. */
export class Kernel<Exports> {
  readonly #bytes: () => Uint8Array<ArrayBuffer>
  #module: object | undefined

  constructor(bytes: () => Uint8Array<ArrayBuffer>) {
    this.#bytes = bytes
  }

  on(memory: Memory): Exports {
    this.#module ??= new WebAssembly.Module(this.#bytes())
    const { exports } = new WebAssembly.Instance(this.#module, { of: { memory } })
    // What is assembled exports just these functions; WebAssembly's types cannot say so.
    return exports as unknown as Exports
  }
}

/** Whether this engine takes a module. */
export const isValid = (bytes: Uint8Array<ArrayBuffer>): boolean => WebAssembly.validate(bytes)

/** What is used of WebAssembly; Node's types leave it out. */
declare const WebAssembly: {
  readonly Memory: new (descriptor: { readonly initial: number }) => Memory
  readonly Module: new (bytes: Uint8Array<ArrayBuffer>) => object
  readonly Instance: new (module: object, imports: object) => { readonly exports: object }
  readonly validate: (bytes: Uint8Array<ArrayBuffer>) => boolean
}

// --- Instructions ------------------------------------------------------------------------------------------------------

const unsigned = (n: number): Code => (n < 128 ? [n] : [(n & 127) | 128, ...unsigned(n >>> 7)])
const signed = (n: number): Code => (n >= -64 && n < 64 ? [n & 127] : [(n & 127) | 128, ...signed(n >> 7)])
const vector = (opcode: number): Code => [0xfd, ...unsigned(opcode)]

export const get = (local: number): Code => [0x20, local]
export const set = (local: number): Code => [0x21, local]
export const tee = (local: number): Code => [0x22, local]
export const constant = (n: number): Code => [0x41, ...signed(n)]
export const constantFloat = (x: number): Code => [0x43, ...new Uint8Array(Float32Array.of(x).buffer)]

export const add: Code = [0x6a]
export const subtract: Code = [0x6b]
export const multiply: Code = [0x6c]
export const and: Code = [0x71]
export const or: Code = [0x72]
export const shiftLeft: Code = [0x74]
export const shiftRight: Code = [0x76]
export const countTrailingZeros: Code = [0x68]
export const lessThan: Code = [0x49]
export const greaterThan: Code = [0x4b]
export const greaterOrEqual: Code = [0x4f]
export const isZero: Code = [0x45]

export const loadInt: Code = [0x28, 2, 0]
export const loadShort: Code = [0x2f, 1, 0]
export const storeInt = (offset: number): Code => [0x36, 2, ...unsigned(offset)]
export const storeByte: Code = [0x3a, 0, 0]
export const loadFloat = (offset: number): Code => [0x2a, 2, ...unsigned(offset)]
export const storeFloat: Code = [0x38, 2, 0]
export const addFloat: Code = [0x92]
export const subtractFloat: Code = [0x93]
export const multiplyFloat: Code = [0x94]
export const maxFloat: Code = [0x97]
export const floatOfInt: Code = [0xb2]

export const loadLanes = (offset: number): Code => [...vector(0x00), 2, ...unsigned(offset)]
/** One float32 in all lanes. */
export const loadSplat = (offset: number): Code => [...vector(0x09), 2, ...unsigned(offset)]
export const storeLanes = (offset: number): Code => [...vector(0x0b), 2, ...unsigned(offset)]
export const constantLanes = (bytes: ReadonlyArray<number>): Code => [...vector(0x0c), ...bytes]
export const zeroLanes: Code = constantLanes(new Array<number>(16).fill(0))
/** The same int32 in all lanes. */
export const constantInts = (...values: ReadonlyArray<number>): Code =>
  constantLanes([...new Uint8Array(Int32Array.from({ length: 4 }, (_, i) => values[i % values.length]!).buffer)])
export const constantFloats = (x: number): Code => constantInts(...new Int32Array(Float32Array.of(x).buffer))
/** Bytes by number: 0 to 15 of the lower operand, 16 to 31 of the upper. */
export const shuffle = (bytes: ReadonlyArray<number>): Code => [...vector(0x0d), ...bytes]
/** Float32s by number: 0 to 3 of the lower operand, 4 to 7 of the upper. */
export const shuffleFloats = (...lanes: ReadonlyArray<number>): Code =>
  shuffle(lanes.flatMap((one) => [0, 1, 2, 3].map((byte) => one * 4 + byte)))
export const swizzle: Code = vector(0x0e)
/** As {@link swizzle} where all indices are below 16; else up to the processor. */
export const relaxedSwizzle: Code = vector(0x100)
export const splatShort: Code = vector(0x10)
export const splatInt: Code = vector(0x11)
export const splatFloat: Code = vector(0x13)
export const lane = (n: number): Code => [...vector(0x1f), n]
export const laneInt = (n: number): Code => [...vector(0x1b), n]

export const andLanes: Code = vector(0x4e)
export const orLanes: Code = vector(0x50)
/** The first operand's bits where the third's are set, else the second's. */
export const selectBits: Code = vector(0x52)
export const bitmaskBytes: Code = vector(0x64)
export const narrowShorts: Code = vector(0x65)
export const narrowShortsUnsigned: Code = vector(0x66)
export const narrowIntsUnsigned: Code = vector(0x86)
export const extendLowBytes: Code = vector(0x87)
export const extendHighBytes: Code = vector(0x88)
export const shiftLeftShorts: Code = vector(0x8b)
export const shiftRightShorts: Code = vector(0x8d)
export const addShorts: Code = vector(0x8e)
export const subtractShorts: Code = vector(0x91)
export const lessShorts: Code = vector(0x30)
export const bitmaskInts: Code = vector(0xa4)
export const shiftLeftInts: Code = vector(0xab)
export const addInts: Code = vector(0xae)
export const minInts: Code = vector(0xb6)
/** Products of int16s, added by pairs to int32s. */
export const dotShorts: Code = vector(0xba)
export const intsOfFloats: Code = vector(0xf8)
export const floatsOfInts: Code = vector(0xfa)

export const lessFloats: Code = vector(0x43)
export const greaterOrEqualFloats: Code = vector(0x46)
export const addLanes: Code = vector(0xe4)
export const subtractLanes: Code = vector(0xe5)
export const multiplyLanes: Code = vector(0xe6)
export const minLanes: Code = vector(0xea)
export const maxLanes: Code = vector(0xeb)

const noResult = 0x40

export const loop = (body: Code): Code => [0x03, noResult, ...body, 0x0b]
/** Jumps back to the beginning of the loop that it ends, where the condition holds. */
export const repeatIf = (condition: Code): Code => [...condition, 0x0d, 0]
export const when = (condition: Code, body: Code): Code => [...condition, 0x04, noResult, ...body, 0x0b]
/** Repeats the body until the condition, which is looked at first, holds. */
export const until = (condition: Code, body: Code): Code => [
  0x02,
  noResult,
  ...loop([...condition, 0x0d, 1, ...body, 0x0c, 0]),
  0x0b
]
export const advance = (local: number, bytes: number): Code => [
  ...get(local),
  ...constant(bytes),
  ...add,
  ...set(local)
]
