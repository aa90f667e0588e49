// Logs in with node-postgres on each port that is named, with TLS or without, and with its channel bound if it can be.
const { Client } = require('pg')

async function outcome({ port, tls, bound }) {
  const { PGHOST: host, PGUSER: user, PGPASSWORD: password } = process.env
  const ssl = tls && { rejectUnauthorized: false }
  const client = new Client({ host, port, user, password, database: 'postgres', ssl, enableChannelBinding: bound })
  client.on('error', () => {})
  try {
    await client.connect()
    const { rows } = await client.query('SELECT 42 AS answer')
    return rows[0].answer
  } catch (error) {
    return error.message
  } finally {
    await client.end().catch(() => {})
  }
}

async function main() {
  for (const target of JSON.parse(process.argv[2])) console.log(JSON.stringify(await outcome(target)))
}

main()
