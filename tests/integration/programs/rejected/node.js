// Connects with node-postgres or postgres.js once for each state that is named, and is rejected there; see python.py.
const [name, ...states] = process.argv.slice(2)
const lines = require('readline').createInterface({ input: process.stdin })

const wait = () => new Promise((go) => lines.once('line', go))
const arrived = (state) => console.log(JSON.stringify({ state }))
const outcome = (use) => use().then(() => null, (error) => error.message)
const rows = "SELECT repeat('x', 8000), nextval('rows_sent'), pg_sleep(0.01) FROM generate_series(1, 6000)"

async function nodePostgres() {
  const client = new (require('pg').Client)()
  const events = []
  client.on('error', (error) => events.push(error.message))
  await client.connect()
  return { events, end: () => client.end(), query: (sql, values) => client.query(sql, values) }
}

async function postgresJs() {
  const { PGHOST: host, PGPORT: port, PGUSER: username, PGDATABASE: database } = process.env
  const sql = require('postgres')({ host, port, username, database, max: 1, fetch_types: false })
  await sql`SELECT 1`
  return { events: [], end: () => sql.end({ timeout: 1 }), query: (text, values) => sql.unsafe(text, values), sql }
}

async function copy(sql) {
  const copying = await sql`COPY copied FROM STDIN`.writable()
  const failed = new Promise((_, fail) => copying.on('error', fail))
  copying.write('1\n')
  arrived('copy')
  await wait()
  for (let n = 0; n < 3000; n++) {
    copying.write('2\n'.repeat(1000))
    await Promise.race([failed, new Promise(setImmediate)])
  }
  copying.end()
  await failed
}

async function beRejected(state) {
  const driver = await (name === 'pg' ? nodePostgres() : postgresJs())
  try {
    if (state === 'transaction') await driver.query('BEGIN')
    if (state !== 'copy') arrived(state)
    if (['idle', 'transaction', 'torn'].includes(state)) await wait()
    if (state === 'extended') await driver.query('SELECT pg_sleep(60), $1::int', [1])
    else if (state === 'copy') await copy(driver.sql)
    else await driver.query({ query: 'SELECT pg_sleep(60)', rows }[state] ?? 'SELECT 2')
    console.log(JSON.stringify({ class: null }))
  } catch (error) {
    const { message: text, code: sqlstate, detail, hint } = error
    const again = []
    while (again.length < 3) again.push(await outcome(() => driver.query('SELECT 3')))
    const events = driver.events
    console.log(JSON.stringify({ class: error.constructor.name, text, sqlstate, detail, hint, again, events }))
  }
  await driver.end().catch(() => {})
}

async function main() {
  for (const state of states) await beRejected(state)
  lines.close()
}

main()
