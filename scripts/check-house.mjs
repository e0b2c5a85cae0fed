// The folder rule: what is in src/ imports downwards only.
//
//   src/main.ts > src/commands > src/server.ts > src/effect.ts > src/index.ts > src/embedded > src/gateway > src/actors > src/shards > src/tiers > src/protocol
//
// A folder knows nothing of the ones above it. src/config.ts may be imported from everywhere but protocol and client,
// and imports protocol only. src/client imports protocol only, and is for main.ts, effect.ts, index.ts and embedded to hand out. test/,
// bench/, deploy/ and scripts/ may import anything of src/; src/ imports none of them.
//
//   node scripts/check-house.mjs [folder with a src/ in it]

import { existsSync, readdirSync, readFileSync } from "node:fs"
import { join, posix, resolve } from "node:path"
import { isProgram, root } from "./setup.mjs"

/** From the top down. */
const floors = [
  "main.ts",
  "commands",
  "server.ts",
  "effect.ts",
  "index.ts",
  "embedded",
  "gateway",
  "actors",
  "shards",
  "tiers",
  "protocol"
]

/** Beside the stairs: what each of them may import besides itself, and which floors may import it. */
/** @type {Record<string, { imports: ReadonlyArray<string>, importedBy: ReadonlyArray<string> }>} */
const beside = {
  "config.ts": { imports: ["protocol"], importedBy: floors.filter((floor) => floor !== "protocol") },
  client: { imports: ["protocol"], importedBy: ["main.ts", "effect.ts", "index.ts", "embedded"] }
}

const outside = ["test", "bench", "deploy", "scripts"]

const isSource = /\.(?:[cm]?[jt]s|[jt]sx)$/

// --- Reading imports -------------------------------------------------------------------------------------------------

/**
 * A piece of source text. `text` is a name, one character of punctuation, or what a string says; a template with
 * something put in is `whole: false`.
 * @typedef {{ kind: "name" | "mark" | "string" | "number", text: string, line: number, whole: boolean }} Token
 */

// After one of these words a slash begins a regular expression.
const beforeRegex = new Set(
  "return typeof instanceof in of new delete void throw case do else await yield extends default".split(" ")
)

/**
 * Splits source text into names, marks and strings; comments and regular expressions leave nothing.
 * @param {string} source
 * @returns {Array<Token>}
 */
const tokenize = (source) => {
  /** @type {Array<Token>} */
  const tokens = []
  let at = 0
  let line = 1
  // For each open brace whether it closes a `${` of a template; for each open bracket whether a condition is in it.
  /** @type {Array<boolean>} */
  const braces = []
  /** @type {Array<boolean>} */
  const brackets = []
  let closedCondition = false

  /**
   * @param {Token["kind"]} kind
   * @param {string} text
   */
  const push = (kind, text, whole = true, where = line) => void tokens.push({ kind, text, line: where, whole })

  const beginsRegex = () => {
    const last = tokens[tokens.length - 1]
    if (last === undefined) return true
    if (last.kind === "string" || last.kind === "number") return false
    if (last.kind === "name") return beforeRegex.has(last.text)
    if (last.text === ")") return closedCondition
    return last.text !== "]" && last.text !== "}"
  }

  /** The end of the regular expression that begins at `at`, or -1 where none ends on its line. */
  const regexEnd = () => {
    let inClass = false
    for (let i = at + 1; i < source.length && source[i] !== "\n"; i++) {
      const c = source[i]
      if (c === "\\") i++
      else if (c === "[") inClass = true
      else if (c === "]") inClass = false
      else if (c === "/" && !inClass) return i + 1
    }
    return -1
  }

  /** @param {string} quote */
  const string = (quote) => {
    let end = at + 1
    let text = ""
    while (end < source.length && source[end] !== quote && source[end] !== "\n") {
      if (source[end] === "\\") end++
      text += source[end++] ?? ""
    }
    // A quote without an end on its line is no string.
    if (source[end] !== quote) return void at++
    push("string", text)
    at = end + 1
  }

  /** The text of a template, from `at` on, up to its end or its next `${`. */
  const template = (begins = true) => {
    const where = line
    let text = ""
    while (at < source.length && source[at] !== "`") {
      if (source[at] === "$" && source[at + 1] === "{") {
        at += 2
        braces.push(true)
        if (begins) push("string", text, false, where)
        return
      }
      if (source[at] === "\\") at++
      if (source[at] === "\n") line++
      text += source[at++] ?? ""
    }
    at++
    if (begins) push("string", text, true, where)
  }

  while (at < source.length) {
    const c = /** @type {string} */ (source[at])
    const next = source[at + 1]
    if (c === "\n") {
      line++
      at++
    } else if (/\s/.test(c)) {
      at++
    } else if (c === "/" && next === "/") {
      while (at < source.length && source[at] !== "\n") at++
    } else if (c === "/" && next === "*") {
      const end = source.indexOf("*/", at + 2)
      const comment = source.slice(at, end < 0 ? source.length : end + 2)
      line += comment.split("\n").length - 1
      at += comment.length
    } else if (c === '"' || c === "'") {
      string(c)
    } else if (c === "`") {
      at++
      template()
    } else if (c === "/" && beginsRegex() && regexEnd() > 0) {
      at = regexEnd()
      push("mark", "/regex/")
    } else if (/[\p{ID_Start}$_#]/u.test(c)) {
      const name = /^[\p{ID_Continue}$#]+/u.exec(source.slice(at, at + 200))?.[0] ?? c
      push("name", name)
      at += name.length
    } else if (/\d/.test(c)) {
      const number = /^[\w.]+/.exec(source.slice(at, at + 200))?.[0] ?? c
      push("number", number)
      at += number.length
    } else {
      if (c === "(") {
        const last = tokens[tokens.length - 1]
        brackets.push(last?.kind === "name" && ["if", "while", "for", "with"].includes(last.text))
      }
      if (c === ")") closedCondition = brackets.pop() ?? false
      if (c === "{") braces.push(false)
      at++
      if (c === "}" && braces.pop()) template(false)
      else push("mark", c)
    }
  }
  return tokens
}

/**
 * What a file imports: static imports, `export … from`, import() as a call and as a type, require(), and the
 * `new URL("./x.ts", import.meta.url)` and `import.meta.resolve("./x.ts")` that start workers.
 * @param {string} source
 * @returns {Array<{ specifier: string, line: number, whole: boolean }>} `whole: false`: only its beginning is known
 */
export const importsOf = (source) => {
  const tokens = tokenize(source)
  /** @type {Array<{ specifier: string, line: number, whole: boolean }>} */
  const found = []
  /**
   * @param {number} i
   * @param {ReadonlyArray<string>} texts
   */
  const follows = (i, texts) =>
    texts.every((text, n) => tokens[i + n]?.kind !== "string" && tokens[i + n]?.text === text)
  /** @param {number} i */
  const take = (i) => {
    const token = tokens[i]
    if (token?.kind === "string") found.push({ specifier: token.text, line: token.line, whole: token.whole })
    return token?.kind === "string"
  }
  /**
   * The string after the `from` that ends an import or export clause.
   * @param {number} i
   */
  const takeFrom = (i) => {
    let depth = 0
    for (let n = i; n < tokens.length; n++) {
      const { kind, text } = /** @type {Token} */ (tokens[n])
      if (kind === "string" && depth === 0) return
      if (kind === "name" && depth === 0 && text === "from" && tokens[n + 1]?.kind === "string") return void take(n + 1)
      // The next statement: there was no `from`.
      if (kind === "name" && depth === 0 && (text === "import" || text === "export")) return
      if (kind !== "mark") continue
      if (text === "{") depth++
      else if (text === "}") depth--
      else if (text !== "," && text !== "*") return
    }
  }

  tokens.forEach((token, i) => {
    if (token.kind !== "name" || (tokens[i - 1]?.text === "." && tokens[i - 1]?.kind === "mark")) return
    if (token.text === "import") {
      if (follows(i + 1, [".", "meta", ".", "resolve", "("])) take(i + 6)
      else if (follows(i + 1, ["("])) take(i + 2)
      else if (!take(i + 1)) takeFrom(i + 1)
    } else if (token.text === "export") {
      const n = follows(i + 1, ["type"]) ? i + 2 : i + 1
      if (follows(n, ["{"]) || follows(n, ["*"])) takeFrom(n)
    } else if (token.text === "require" && follows(i + 1, ["("])) {
      take(i + 2)
    } else if (token.text === "new" && follows(i + 1, ["URL", "("]) && follows(i + 4, [",", "import", ".", "meta"])) {
      take(i + 3)
    }
  })
  return found
}

// --- Judging them ----------------------------------------------------------------------------------------------------

/**
 * The floor that a path below src/ belongs to.
 * @param {string} path
 */
const floorOf = (path) => path.split("/")[0] ?? ""

/** @param {string} floor */
const isKnown = (floor) => floors.includes(floor) || floor in beside

/**
 * Why a file of floor `from` must not import one of floor `to`; undefined where it may.
 * @param {string} from
 * @param {string} to
 */
const objection = (from, to) => {
  if (from === to) return undefined
  if (!isKnown(to)) return "which has no place in the order of scripts/check-house.mjs"
  const side = beside[from]
  if (side)
    return side.imports.includes(to) ? undefined : `but src/${from} imports only src/${side.imports.join(", src/")}`
  const target = beside[to]
  if (target) return target.importedBy.includes(from) ? undefined : `which is not for src/${from}`
  return floors.indexOf(from) < floors.indexOf(to) ? undefined : "which lies above it"
}

/**
 * @param {string} dir
 * @returns {Array<string>} paths below it, with slashes
 */
const filesBelow = (dir) =>
  readdirSync(dir, { withFileTypes: true })
    .flatMap((entry) => {
      if (entry.name === "node_modules") return []
      if (entry.isDirectory()) return filesBelow(join(dir, entry.name)).map((path) => `${entry.name}/${path}`)
      return isSource.test(entry.name) ? [entry.name] : []
    })
    .sort()

/**
 * The imports below `dir`/src that the folder rule forbids, one line each.
 * @param {string} dir
 * @returns {Array<string>}
 */
export const violations = (dir) => {
  const source = join(dir, "src")
  if (!existsSync(source)) return []
  const manifest = join(dir, "package.json")
  /** @type {{ name?: string, exports?: Record<string, unknown> }} */
  const { name, exports } = existsSync(manifest) ? JSON.parse(readFileSync(manifest, "utf8")) : {}

  /**
   * Where a specifier leads, as a path from `dir`; undefined for another package.
   * @param {string} file
   * @param {string} specifier
   */
  const target = (file, specifier) => {
    if (/^\.\.?(?:\/|$)/.test(specifier)) {
      const path = posix.join("src", posix.dirname(file), specifier.replace(/[?#].*$/, ""))
      return path.replace(/\/$/, "")
    }
    if (specifier === name) return "src/index.ts"
    if (name && specifier.startsWith(`${name}/`)) {
      const exported = exports?.[`.${specifier.slice(name.length)}`]
      return typeof exported === "string" ? posix.normalize(exported) : posix.join("src", specifier.slice(name.length))
    }
    return undefined
  }

  return filesBelow(source).flatMap((file) => {
    const from = floorOf(file)
    if (!isKnown(from)) {
      return [`src/${file}:1  has no place in the order of scripts/check-house.mjs`]
    }
    return importsOf(readFileSync(join(source, file), "utf8")).flatMap(({ line, specifier, whole }) => {
      /** @param {string} why */
      const wrong = (why) => [`src/${file}:${line}  imports  ${specifier}${whole ? "" : "…"}  ${why}`]
      if (/^(?:\/|file:|#)|^\..*%/.test(specifier)) return wrong("which is not a plain relative path")
      const path = target(file, specifier)
      if (path === undefined) return []
      if (!whole) return wrong("which is put together while running, so that it cannot be checked")
      const [top = "", next] = path.split("/")
      if (top === "src") {
        // The folder itself, as a place to look for files.
        if (next === undefined) return []
        const why = objection(from, next)
        return why === undefined ? [] : wrong(why)
      }
      return outside.includes(top) ? wrong("which lies outside src") : []
    })
  })
}

if (isProgram(import.meta.url)) {
  const found = violations(resolve(process.argv[2] ?? root))
  for (const line of found) process.stdout.write(`${line}\n`)
  if (found.length > 0) process.exitCode = 1
}
