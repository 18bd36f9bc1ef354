// What AsyncAPI's own parser says of a document.
import fs from "node:fs";
import parser from "@asyncapi/parser";

const { document, diagnostics } = await new parser.Parser().parse(fs.readFileSync(0, "utf8"));
const messages = document?.allMessages().all().map((message) => message.id()) ?? [];
console.log(JSON.stringify({ messages, diagnostics }));
