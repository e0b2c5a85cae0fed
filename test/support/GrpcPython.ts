/** Where Python finds grpcio and its protoc, for a gRPC client of another language; `.ci/run` puts them there. */
import { execFile, spawnSync } from "node:child_process"
import { fileURLToPath } from "node:url"
import { promisify } from "node:util"
import { protoDirectory } from "./Grpc.ts"

export const grpcioVersion = "1.85.1"

const root = fileURLToPath(new URL("../../", import.meta.url))
const folder = `${root}.cache/grpc-python`

const howToGet = `python3 -m pip install --target .cache/grpc-python grpcio-tools==${grpcioVersion}`

const environment = { ...process.env, PYTHONPATH: folder, PYTHONDONTWRITEBYTECODE: "1" }

const installed = (): boolean =>
  spawnSync("python3", ["-c", "import grpc, grpc_tools"], { env: environment }).status === 0

/** Whether its test is left out: with a line that says how to get it, and not where the whole suite has to run. */
export const withoutGrpcPython = (): boolean => {
  if (process.env["RUVECTOR_CI"] !== undefined || installed()) return false
  console.warn(`skipped, as Python has no grpcio: ${howToGet}`)
  return true
}

/** Runs a program against a port, and gives the JSON it prints. */
export const runPython = async (program: string, port: number): Promise<unknown> => {
  const args = [fileURLToPath(new URL(program, import.meta.url)), String(port), protoDirectory]
  const { stdout } = await promisify(execFile)("python3", args, { env: environment, timeout: 25_000 })
  return JSON.parse(stdout)
}
