// Does steps with node-postgres or postgres.js, as its argument says: see playing.py.
const { createHash } = require('crypto')
const lines = require('fs').readFileSync(0, 'utf8').split('\n').filter(Boolean)

const digest = (rows) => {
  const first = rows.slice(0, 3).map((row) => row.map((value) => String(value).slice(0, 80)))
  return { rows: rows.length, first, md5: createHash('md5').update(JSON.stringify(rows)).digest('hex') }
}

async function nodePostgres() {
  const client = new (require('pg').Client)()
  await client.connect()
  const query = async (sql, values, name) => (await client.query({ text: sql, values, name, rowMode: 'array' })).rows
  return { query, end: () => client.end() }
}

async function postgresJs() {
  const { PGHOST: host, PGPORT: port, PGUSER: username, PGDATABASE: database } = process.env
  const path = host.startsWith('/') ? { path: `${host}/.s.PGSQL.${port}` } : { host, port }
  const sql = require('postgres')({ ...path, username, database, max: 1, onnotice: () => {} })
  const query = async (text, values, name) => [...(await sql.unsafe(text, values, { prepare: !!name }).values())]
  return { query, end: () => sql.end({ timeout: 5 }) }
}

async function main() {
  const driver = await (process.argv[2] === 'pg' ? nodePostgres() : postgresJs())
  const execute = async (sql, values, name) => {
    try {
      return digest(await driver.query(sql, values && values.length ? values : undefined, name))
    } catch (error) {
      return error.code || String(error)
    }
  }
  for (const line of lines) {
    const step = JSON.parse(line)
    let got
    if (step.do === 'prepared' || step.do === 'transaction') {
      got = []
      for (const values of step.lists || []) got.push(await execute(step.sql, values, `s${step.n}`))
      for (const sql of step.statements || []) got.push(await execute(sql))
    } else if (step.do === 'big') {
      got = await execute(step.sql, [step.letter.repeat(step.size), step.letter.repeat(step.size)])
    } else {
      got = await execute(step.sql, step.values)
    }
    console.log(JSON.stringify({ n: step.n, do: step.do, got }))
  }
  await driver.end()
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
