// Which of the requests, a JSON text each, the two libraries accept: a line each of those that do.
import fs from "node:fs";
import * as standard from "standardwebhooks";
import * as svix from "svix";

for (const line of fs.readFileSync(0, "utf8").split("\n").filter(Boolean)) {
  const { secret, headers, body } = JSON.parse(line);
  const accepts = { standardwebhooks: standard.Webhook, svix: svix.Webhook };
  for (const name in accepts) {
    try {
      new accepts[name](secret).verify(Buffer.from(body, "base64"), headers);
    } catch {
      delete accepts[name];
    }
  }
  console.log(Object.keys(accepts).join(" "));
}
