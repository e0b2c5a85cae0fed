/** What deploy/ says of the program is true of it: settings, commands, files and versions that it names. */
import { spawn } from "node:child_process"
import { existsSync, readFileSync } from "node:fs"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import { assert, describe, it } from "@effect/vitest"
import { parse } from "yaml"
import { flagOf, readSettings, type SettingName, settings, variableOf } from "../../src/config.ts"
import { fakeGcsVersion } from "../support/FakeGcs.ts"

const root = fileURLToPath(new URL("../../", import.meta.url))
const read = (path: string) => readFileSync(join(root, path), "utf8")

interface Service {
  readonly image: string
  readonly command?: ReadonlyArray<string>
  readonly environment?: Readonly<Record<string, string>>
  readonly depends_on?: Readonly<Record<string, unknown>> | ReadonlyArray<string>
  readonly volumes?: ReadonlyArray<string>
  readonly profiles?: ReadonlyArray<string>
}

const compose = parse(read("deploy/compose.yaml"), { merge: true }) as {
  readonly services: Readonly<Record<string, Service>>
  readonly volumes: Readonly<Record<string, unknown>>
}

/** `${NAME:-default}` is the default where nothing is set. */
const resolved = (text: string) => text.replace(/\$\{[A-Z_]+:-([^}]*)\}/g, "$1")

const ours = Object.entries(compose.services).filter(([, { image }]) => image === "ruvector-streaming")

describe("deploy/compose.yaml", () => {
  it("starts nodes with settings that there are, in values that they take", () => {
    const roles: Array<string> = []
    for (const [name, { command = [], environment = {} }] of ours) {
      const [verb, ...words] = command
      const env = Object.fromEntries(Object.entries(environment).map(([key, value]) => [key, resolved(String(value))]))
      for (const key of Object.keys(env)) {
        const known = Object.keys(settings).some((one) => variableOf(one as SettingName) === key)
        assert.isTrue(known || key === "STORAGE_EMULATOR_HOST", `${name}: ${key}`)
      }
      if (verb !== "serve") continue
      const flags: Partial<Record<SettingName, string>> = {}
      for (let i = 0; i < words.length; i += 2) {
        const setting = Object.keys(settings).find((one) => `--${flagOf(one as SettingName)}` === words[i])
        assert.isDefined(setting, `${name}: ${words[i]}`)
        flags[setting as SettingName] = words[i + 1] as string
      }
      const values = readSettings(flags, env)
      roles.push(values.role)
      // Others reach it by its name in the network.
      if (values.role === "runner") assert.strictEqual(values.clusterHost, name)
      assert.match(values.databaseUrl, /^postgres:\/\/ruvector:ruvector@postgres:5432\/ruvector$/)
    }
    assert.deepStrictEqual(roles.sort(), ["gateway", "gateway", "runner", "runner", "runner"])
  })

  it("names only services and volumes that there are, and images by their version", () => {
    for (const [name, { image, depends_on = [], volumes = [] }] of Object.entries(compose.services)) {
      const needed = Array.isArray(depends_on) ? (depends_on as ReadonlyArray<string>) : Object.keys(depends_on)
      for (const one of needed) assert.property(compose.services, one, name)
      for (const volume of volumes) assert.property(compose.volumes, volume.split(":")[0] as string, name)
      if (image !== "ruvector-streaming") assert.match(image, /:\d+\.\d+/, name)
    }
    assert.strictEqual(compose.services["gcs"]?.image, `fsouza/fake-gcs-server:${fakeGcsVersion.slice(1)}`)
  })

  it("has commands that there are", { timeout: 60_000 }, async () => {
    const verbs = new Set(ours.flatMap(([, { command }]) => command?.[0] ?? []))
    assert.deepStrictEqual([...verbs].sort(), ["migrate", "serve"])
    const help = await new Promise<string>((resolve) => {
      let text = ""
      const child = spawn(process.execPath, [join(root, "src/main.ts"), "--help"], {
        stdio: ["ignore", "pipe", "inherit"]
      })
      child.stdout.on("data", (chunk: Buffer) => (text += chunk.toString()))
      child.once("close", () => resolve(text))
    })
    for (const verb of verbs) assert.match(help, new RegExp(`^ +${verb} `, "m"))
  })
})

describe("deploy/Dockerfile", () => {
  const lines = read("deploy/Dockerfile")
    .replaceAll("\\\n", " ")
    .split("\n")
    .filter((line) => line !== "" && !line.startsWith("#"))
  const instructions = lines.map((line) => {
    const [, word = "", rest = ""] = /^([A-Z]+) (.*)$/.exec(line) ?? []
    return { word, rest }
  })
  const of = (wanted: string) => instructions.flatMap(({ word, rest }) => (word === wanted ? [rest] : []))

  it("copies files that there are and that are not ignored", () => {
    const allowed = read(".dockerignore")
      .split("\n")
      .flatMap((line) => (line.startsWith("!") ? [line.slice(1)] : []))
    for (const rest of of("COPY")) {
      if (rest.startsWith("--from")) continue
      for (const path of rest.split(" ").slice(0, -1)) {
        assert.isTrue(existsSync(join(root, path)), path)
        assert.isTrue(
          allowed.some((one) => path === one || path.startsWith(`${one}/`)),
          path
        )
      }
    }
  })

  it("runs on the Node release of the project, as another user than root, what package.json calls the command", () => {
    const { devDependencies, bin } = JSON.parse(read("package.json")) as {
      readonly devDependencies: Readonly<Record<string, string>>
      readonly bin: Readonly<Record<string, string>>
    }
    for (const from of of("FROM")) assert.match(from, new RegExp(`^node:${devDependencies["node"]}-`))
    assert.strictEqual(of("USER").at(-1), "node")
    assert.deepStrictEqual(JSON.parse(of("ENTRYPOINT")[0] as string), ["node", bin["ruvector"]])
    assert.deepStrictEqual(JSON.parse(of("CMD").at(-1) as string), ["serve"])
    for (const rest of of("ENV")) {
      for (const [, name = ""] of rest.matchAll(/(RUVECTOR_\w+)=/g)) {
        const known = Object.keys(settings).some((one) => variableOf(one as SettingName) === name)
        assert.isTrue(known || name === "RUVECTOR_NATIVE_ARCH", name)
      }
    }
  })
})
