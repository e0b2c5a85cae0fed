/** Self-signed certificates for `localhost`, or another host, and 127.0.0.1, made here: no tool and no file is needed for them. */
import { generateKeyPairSync, randomBytes, sign } from "node:crypto"

export interface Certificate {
  readonly cert: string
  readonly key: string
}

export const makeCertificate = (commonName: string, host = "localhost"): Certificate => {
  const { publicKey, privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" })
  const ecdsaWithSha256 = sequence(objectId("2a8648ce3d040302"))
  const name = sequence(set(sequence(objectId("550403"), tagged(0x0c, Buffer.from(commonName)))))
  const names = sequence(tagged(0x82, Buffer.from(host)), tagged(0x87, Buffer.from([127, 0, 0, 1])))
  const extensions = sequence(
    sequence(objectId("551d11"), tagged(0x04, names)),
    sequence(
      objectId("551d13"),
      tagged(0x01, Buffer.from([0xff])),
      tagged(0x04, sequence(tagged(0x01, Buffer.from([0xff]))))
    )
  )
  const toBeSigned = sequence(
    tagged(0xa0, tagged(0x02, Buffer.from([2]))),
    tagged(0x02, Buffer.concat([Buffer.from([1]), randomBytes(8)])),
    ecdsaWithSha256,
    name,
    sequence(time(Date.now() - 3_600_000), time(Date.now() + 86_400_000)),
    name,
    publicKey.export({ type: "spki", format: "der" }),
    tagged(0xa3, extensions)
  )
  const signature = sign("sha256", toBeSigned, privateKey)
  const der = sequence(toBeSigned, ecdsaWithSha256, tagged(0x03, Buffer.concat([Buffer.from([0]), signature])))
  const lines = der.toString("base64").replaceAll(/(.{64})/g, "$1\n")
  return {
    cert: `-----BEGIN CERTIFICATE-----\n${lines.trimEnd()}\n-----END CERTIFICATE-----\n`,
    key: privateKey.export({ type: "pkcs8", format: "pem" }) as string
  }
}

const tagged = (tag: number, content: Buffer): Buffer => {
  const { length } = content
  const size = length < 0x80 ? [length] : length < 0x100 ? [0x81, length] : [0x82, length >> 8, length & 0xff]
  return Buffer.concat([Buffer.from([tag, ...size]), content])
}
const sequence = (...parts: ReadonlyArray<Buffer>) => tagged(0x30, Buffer.concat(parts))
const set = (...parts: ReadonlyArray<Buffer>) => tagged(0x31, Buffer.concat(parts))
const objectId = (hex: string) => tagged(0x06, Buffer.from(hex, "hex"))
const time = (millis: number) =>
  tagged(0x18, Buffer.from(`${new Date(millis).toISOString().replaceAll(/[-:T]|\.\d+/g, "")}`))
